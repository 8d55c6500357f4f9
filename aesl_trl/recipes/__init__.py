"""Does a recipe hold together, and does it fit its GPUs?"""
