"""What a run will need, computed from its config: ``scripts/plan.py``. Imports neither torch nor NeMo.

One thing is not in the config: how many characters CTC has to choose from (``units: characters``). That is read from
the tokenizer's file.
"""
