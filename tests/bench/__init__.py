"""The benchmark: udbad side by side with what people would pick instead, on the same data in one run.

Run it with ``python -m tests.bench`` as root (README.md beside this file says what each figure means). It is no test:
nothing here asserts a time, and pytest collects nothing from it.
"""
