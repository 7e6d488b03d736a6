"""Many runs as one question: rules against each other, or the method without each module.

Every rule gets the same devices, data and client work; each baseline the same tuning budget.
"""
