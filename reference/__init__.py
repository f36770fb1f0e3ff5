"""What attention over packed documents means: cases, layouts, values, exact answers and error budgets.

This floor imports neither ``backends`` nor ``attn_fuzz`` and holds no kernel.
"""
