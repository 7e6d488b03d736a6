"""Local fine-tuning, data and evaluation. Modules here import core and errors, nothing above."""
