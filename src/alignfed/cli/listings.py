"""What there is to choose from, as tables: rules, their settings, fleets, and a recipe's plan."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from alignfed.cli.words import count, duration, flops, percent, rate, size
from alignfed.config.words import toml_text
from alignfed.core.aggregation import RULES
from alignfed.core.lora import LORA_RULES, incompatibility
from alignfed.errors import RecipeError
from alignfed.planning import Plan
from alignfed.simulation.presets import KINDS, PRESETS
from alignfed.training.naming import nearest_name


def print_rules(console: Console) -> None:
    """Show aggregation rules and LoRA rules."""
    table = _table("aggregation rules: strategy.rule", "rule", "", "what it does", "source")
    for name, entry in RULES.items():
        kind = "synchronous" if entry.synchronous else "asynchronous"
        table.add_row(name, kind, entry.description, entry.source)
    console.print(table)
    table = _table("LoRA rules: strategy.lora", "rule", "", "what it does", "source")
    for name, row in LORA_RULES.items():
        kind = f"{row.space}s, mixed ranks" if row.mixed_ranks else f"{row.space}s"
        table.add_row(name, kind, row.description, row.source)
    console.print(table)
    console.print("alignfed strategies RULE shows a rule's settings", style="dim")


def print_rule(console: Console, name: str) -> None:
    """Show one rule's settings.

    Raises:
        RecipeError: there is no such rule.
    """
    if name not in RULES:
        raise RecipeError(
            f"no rule is called {name!r}; there are {', '.join(RULES)}{nearest_name(name, RULES)}",
            name=name,
        )
    entry = RULES[name]
    console.print(f"[bold]{name}[/bold]: {entry.description}\n{entry.source}", highlight=False)
    table = _table("strategy.settings", "setting", "default", "accepts", "meaning")
    for setting in entry.settings:
        table.add_row(setting.name, toml_text(setting.default), setting.limits, setting.meaning)
    console.print(table)
    grid = ", ".join(f"{value:g}" for value in entry.step_grid)
    console.print(f"worth tuning first: {entry.step_setting}, for example {grid}", style="dim")
    fitting = [lora for lora in LORA_RULES if incompatibility(entry.make(), lora) is None]
    if len(fitting) < len(LORA_RULES):
        console.print(f"with these settings strategy.lora: {', '.join(fitting)}", style="dim")


def print_fleets(console: Console) -> None:
    """Show the fleets that come with the package, and the kinds of devices they mix."""
    table = _table("fleets: fleet.preset", "fleet", "what it is", "kinds")
    for name, preset in PRESETS.items():
        kinds = ", ".join(f"{share:.0%} {tier}" for tier, share in preset.shares.items())
        table.add_row(name, preset.description, kinds)
    console.print(table)
    table = _table(
        "kinds of devices: fleet.reference", "kind", "peak", "achieved", "memory", "down", "up"
    )
    table.columns[0].no_wrap = True
    for name, kind in KINDS.items():
        device = kind.device
        table.add_row(
            name,
            rate(device.flops_per_s),
            percent(device.efficiency),
            size(device.memory_bytes),
            f"{size(device.down_bytes_per_s)}/s",
            f"{size(device.up_bytes_per_s)}/s",
        )
    console.print(table)
    console.print("where the figures come from", style="bold")
    for name, kind in KINDS.items():
        console.print(f"  [bold]{name}[/bold]: {kind.source}", highlight=False)
    console.print(
        "other fleets: fleet.distribution (lognormal, pareto), fleet.file (FLASH, LiveLab,"
        " FedScale), fleet.bandwidth (Pensieve), fleet.replay (a recorded run)",
        style="dim",
    )


def print_plan(console: Console, plan: Plan) -> None:
    """Show what a recipe costs on each kind of device."""
    memory = plan.memory
    console.print(
        f"{plan.model}: {count(plan.base_parameters)} parameters frozen,"
        f" {count(plan.adapter_parameters)} trained; an adapter is {size(plan.adapter_bytes)} each"
        f" way\ntraining needs {size(memory.total_bytes)}: weights"
        f" {size(memory.weights_bytes)}, adapter with gradients and AdamW"
        f" {size(memory.adapter_bytes)}, activations {size(memory.activation_bytes)}, logits"
        f" {size(memory.logits_bytes)}\na step is {plan.tokens_per_step} tokens at most,"
        f" {flops(plan.flops_per_token)} each",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = _table(
        "on each kind of device", "kind", "share", "memory", "a step", "steps", "a task", "network",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    for tier in plan.tiers:
        task_s = None if tier.steps is None else tier.steps * tier.step_s + tier.transfer_s
        table.add_row(
            tier.tier,
            f"{tier.share:.0%}" if tier.share else "",
            size(tier.memory_bytes) + ("" if tier.fits else "[red]*[/red]"),
            duration(tier.step_s),
            "" if tier.steps is None else str(tier.steps),
            duration(task_s),
            duration(tier.transfer_s),
        )
    console.print(table)
    if not all(tier.fits for tier in plan.tiers):
        console.print("[red]*[/red] too little memory for this recipe", highlight=False)
    short = [tier.tier for tier in plan.tiers if tier.share and not tier.fits]
    if short:
        console.print(
            f"[red]this recipe would be refused[/red]: {', '.join(short)} cannot hold it; lower"
            " training.batch_size or data.max_length, turn on model.gradient_checkpointing, or"
            " choose another fleet",
            highlight=False,
        )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
