"""The Python interface: what `import qpref` offers, by the same code as the commands, without printing"""
