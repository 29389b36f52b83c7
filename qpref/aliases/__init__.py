"""Keys of other tools, TRL, Axolotl and LLaMA-Factory above all: what they are in a recipe, or why they are in none"""
