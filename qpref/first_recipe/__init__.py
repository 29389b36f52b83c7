"""A first recipe for given data, model, device and goal: commented, with reasons, and planned"""
