"""From a run's records to what a person reads. Nothing here looks at the coordinator."""

from alignfed.report.fairness import jain_index, worst_tenth_mean
from alignfed.report.summary import RunFacts, UploadFact, summarise

__all__ = ["RunFacts", "UploadFact", "jain_index", "summarise", "worst_tenth_mean"]
