"""What a recipe will cost, counted from sizes: nothing here downloads or loads a tensor."""

from alignfed.planning.blueprint import Blueprint
from alignfed.planning.plan import Plan, TierPlan, make_plan

__all__ = ["Blueprint", "Plan", "TierPlan", "make_plan"]
