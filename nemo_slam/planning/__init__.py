"""What a run will need, computed from its config alone: ``scripts/plan.py``. Imports neither torch nor NeMo."""
