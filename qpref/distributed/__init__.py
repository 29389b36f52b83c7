"""The processes of one run: joining them, what they tell each other, and what happens when one is lost."""
