"""Budgets for accuracy and size: what is asked, and the search that meets it."""

from clipquant.budget.goal import BudgetError, size_in_bytes
from clipquant.budget.search import meet

__all__ = ["BudgetError", "meet", "size_in_bytes"]
