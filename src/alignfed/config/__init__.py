"""Recipes: validated settings. An unknown key is an error that names the nearest one."""

from alignfed.config.compare import AblateSection, CompareSection
from alignfed.config.data import DataSection, PartitionSection, TemplateSection
from alignfed.config.deploy import DeploySection
from alignfed.config.document import write_commented, write_recipe
from alignfed.config.fleet import FleetSection, VariationSection
from alignfed.config.load import default_recipe, load_recipe, make_recipe
from alignfed.config.model import ArchitectureSection, LoraSection, ModelSection
from alignfed.config.problems import Problem
from alignfed.config.recipe import Recipe
from alignfed.config.run import (
    EvaluationSection,
    ServerSection,
    StopSection,
    StrategySection,
    TrainingSection,
)

__all__ = [
    "AblateSection",
    "ArchitectureSection",
    "CompareSection",
    "DataSection",
    "DeploySection",
    "EvaluationSection",
    "FleetSection",
    "LoraSection",
    "ModelSection",
    "PartitionSection",
    "Problem",
    "Recipe",
    "ServerSection",
    "StopSection",
    "StrategySection",
    "TemplateSection",
    "TrainingSection",
    "VariationSection",
    "default_recipe",
    "load_recipe",
    "make_recipe",
    "write_commented",
    "write_recipe",
]
