"""Configuration files of TRL, Axolotl and LLaMA-Factory as recipes, with a word on everything that has no equal"""
