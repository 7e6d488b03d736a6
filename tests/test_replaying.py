"""A replay reproduces a server's run under every rule, and names the first thing that is not so."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import alignfed
from alignfed.cli.app import app
from alignfed.coordinating import make_coordinator
from alignfed.core.aggregation import RULES
from alignfed.core.lora import LORA_RULES, exchange_of
from alignfed.errors import AlignFedError, JournalError
from alignfed.journal import RunReader, write_text_atomically
from tests.journal.serving import META, Calibration, Server

SERVER = ["server.concurrency=3", "server.buffer_size=2", "evaluation.every_versions=2"]


@pytest.fixture(autouse=True)
def forget_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def serve(
    root: Path,
    *overrides: str,
    steps: int = 14,
    ranks: dict[int, int] | None = None,
    restart_at: int | None = None,
    keep_payloads: bool = True,
) -> Path:
    """A deployed server's run: a few uploads, checkpoints now and then, perhaps a restart."""
    recipe = alignfed.default_recipe([*SERVER, *overrides])
    text = recipe.to_toml()
    exchange = exchange_of(recipe.strategy.lora).with_ranks(ranks or {})
    coordinator = make_coordinator(recipe, Calibration(), exchange)
    root.mkdir(parents=True)
    write_text_atomically(root / "recipe.toml", text)
    meta = replace(META, recipe_sha256=hashlib.sha256(text.encode()).hexdigest())
    server = Server.begin(root, coordinator, meta=meta, keep_payloads=keep_payloads)
    for step in range(1, steps + 1):
        server.step()
        if step == restart_at:
            server.log.close()
            server = Server.restart(root, coordinator)
        if step % 5 == 0:
            server.checkpoint()
    assert server.state.version >= 1
    server.log.close()
    return root


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        return serve(tmp_path_factory.mktemp("served") / "run")


@pytest.fixture
def run(served: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(served, tmp_path / "copy"))


def change(run: Path, sql: str, *parameters: Any) -> None:
    connection = sqlite3.connect(run / "journal.sqlite")
    with connection:
        assert connection.execute(sql, parameters).rowcount == 1
    connection.close()


def edit_body(run: Path, seq: int, edit: Callable[[dict[str, Any]], None]) -> None:
    connection = sqlite3.connect(run / "journal.sqlite")
    ((text,),) = connection.execute("SELECT body FROM rows WHERE seq = ?", (seq,)).fetchall()
    connection.close()
    body = json.loads(text)
    edit(body)
    change(run, "UPDATE rows SET body = ? WHERE seq = ?", json.dumps(body), seq)


def rows(run: Path, name: str) -> list[Any]:
    with RunReader(run) as reader:
        return list(reader.rows(name=name))


# --- what is reproduced -----------------------------------------------------------------------


def settings_of(rule: str) -> Iterator[tuple[str, list[str]]]:
    yield rule, []
    if rule == "alignfed":
        yield rule, ["strategy.settings.alignment_map=both"]
        yield rule, ["strategy.settings.variant=paper"]


@pytest.mark.parametrize(
    ("rule", "settings"), [pair for rule in RULES for pair in settings_of(rule)]
)
def test_every_rule_is_reproduced_to_the_bit(
    tmp_path: Path, rule: str, settings: list[str]
) -> None:
    root = serve(tmp_path / "run", f"strategy.rule={rule}", *settings)
    result = alignfed.replay(root)
    assert (result.divergence, result.exact, result.began_after) == (None, True, 0)
    with RunReader(root) as reader:
        assert result.versions == len(list(reader.versions())) > 0
        assert result.instructions == sum(row.kind == "instruction" for row in reader.rows())
        assert result.events == sum(row.kind == "event" for row in reader.rows())
        assert set(reader.rejections()) == {"not_finite"}


@pytest.mark.parametrize("lora", LORA_RULES)
def test_every_lora_rule_is_reproduced_to_the_bit_mixed_ranks_included(
    tmp_path: Path, lora: str
) -> None:
    overrides = ["strategy.rule=fedbuff", f"strategy.lora={lora}"]
    ranks = {1: 1} if LORA_RULES[lora].mixed_ranks else None
    result = alignfed.replay(serve(tmp_path / "run", *overrides, ranks=ranks))
    assert (result.divergence, result.exact) == (None, True)
    assert result.versions > 0


@pytest.mark.parametrize("keep_payloads", [False, True])
def test_a_restarted_server_is_reproduced_from_what_it_kept(
    tmp_path: Path, keep_payloads: bool
) -> None:
    root = serve(tmp_path / "run", steps=17, restart_at=12, keep_payloads=keep_payloads)
    result = alignfed.replay(root)
    assert (result.divergence, result.exact) == (None, True)
    assert (result.began_after == 0) == keep_payloads
    assert result.events > 0


def test_a_replay_needs_neither_calibrator_nor_the_recipes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"q": "a", "a": "b"}\n')
    overrides = [
        f"data.path={data}",
        'data.template={prompt="{q}", response="{a}"}',
        "data.num_examples=unset",
        "data.evaluation_examples=unset",
        "data.evaluation_fraction=0.2",
        "strategy.settings.alignment_map=activation",
    ]
    root = serve(tmp_path / "run", *overrides)
    data.unlink()
    monkeypatch.setattr("alignfed.replaying._real_calibrator", None)
    assert alignfed.replay(root).divergence is None


def test_a_replay_changes_nothing(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    alignfed.replay(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_replay_computes_with_the_runs_threads_and_gives_them_back(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, set_to = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    alignfed.replay(run)
    assert set_to == [mine, mine]  # the run was made in this process


def test_each_step_brings_what_it_led_to_and_the_state(run: Path) -> None:
    from alignfed.replaying import steps

    versions = []
    for one in steps(run):
        versions.append(one.state.version)
        if one.state.version == 2:
            break  # and the directory is closed again
    assert versions[-1] == 2 and sorted(versions) == versions
    outcome = CliRunner().invoke(app, ["replay", "-v", str(run)])
    with RunReader(run) as reader:
        recorded = [row for row in reader.rows() if row.kind in ("event", "instruction")]
    lines = outcome.output.splitlines()
    assert len(lines) == len(recorded) + 1
    assert sum(line.startswith("row ") for line in lines) == alignfed.replay(run).events
    assert outcome.exit_code == 0 and "reproduced, bit for bit" in lines[-1]


# --- what is different ------------------------------------------------------------------------


def test_a_tampered_instruction_is_shown_with_both_sides(run: Path) -> None:
    row = rows(run, "Publish")[2]
    edit_body(run, row.seq, lambda body: body["applied"][0].__setitem__(4, 0.123))
    result = alignfed.replay(run)
    found = result.divergence
    assert found is not None and found.expected is not None and found.came is not None
    assert found.expected.seq == found.came.seq == row.seq
    assert "applied[0][4] is" in found.difference and "on record 0.123" in found.difference
    assert result.versions == 2
    outcome = CliRunner().invoke(app, ["replay", str(run)])
    assert outcome.exit_code == 1
    assert f"DIVERGED at row {found.event.seq}" in outcome.output
    assert "expected: Publish version 3" in outcome.output and "0.123" in outcome.output
    assert "2 server versions were reproduced before that" in outcome.output


def test_a_tampered_adapter_of_a_version_is_a_divergence(run: Path) -> None:
    publish = rows(run, "Publish")
    edit_body(
        run, publish[1].seq, lambda body: body.__setitem__("adapter", publish[0].body["adapter"])
    )
    result = alignfed.replay(run)
    assert result.divergence is not None
    assert "the adapter's checksum is" in result.divergence.difference
    assert "apart" in result.divergence.difference


@pytest.mark.parametrize("name", ["Dispatch", "Reject", "SetTimer", "Evaluate"])
def test_an_instruction_taken_out_or_put_in_is_a_divergence(run: Path, name: str) -> None:
    seq = rows(run, name)[1].seq
    copy = shutil.copytree(run, run.parent / "other")
    change(run, "DELETE FROM rows WHERE seq = ?", seq)
    result = alignfed.replay(run)
    assert result.divergence is not None
    change(copy, "UPDATE rows SET name = 'SetTimer', body = '{\"at_s\":5.5}' WHERE seq = ?", seq)
    result = alignfed.replay(copy)
    assert result.divergence is not None and result.divergence.expected.name == "SetTimer"


def test_an_event_taken_out_is_a_divergence(run: Path) -> None:
    (seq,) = [row.seq for row in rows(run, "ClientJoined")][1:2]
    change(run, "DELETE FROM rows WHERE seq = ?", seq)
    result = alignfed.replay(run)
    assert result.divergence is not None


def test_an_answer_changed_or_taken_out_is_a_divergence(run: Path) -> None:
    notes = rows(run, "CalibratorAnswered")
    copy = shutil.copytree(run, run.parent / "other")
    edit_body(run, notes[0].seq, lambda body: body["answers"][0].__setitem__(2, "1e9"))
    assert alignfed.replay(run).divergence is not None
    edit_body(copy, notes[0].seq, lambda body: body["answers"].pop())
    result = alignfed.replay(copy)
    assert result.divergence is not None and result.divergence.position is None
    assert "the record asks nothing more here" in result.divergence.difference
    outcome = CliRunner().invoke(app, ["replay", str(copy)])
    assert outcome.exit_code == 1 and "asks the calibrator for the loss" in outcome.output


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_tampered_upload_is_named_with_how_far_all_was_well(run: Path, damage: str) -> None:
    upload = rows(run, "UpdateArrived")[3]
    path = run / "checkpoints" / f"{upload.body['adapter']}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    if damage == "missing":
        path.unlink()
    with pytest.raises(JournalError, match=rf"^\d+ of \d+ events .* then: .*{path.name}"):
        alignfed.replay(run)
    outcome = CliRunner().invoke(app, ["replay", str(run)])
    assert outcome.exit_code == 2


def test_an_upload_swapped_for_another_is_a_divergence(run: Path) -> None:
    first, other = rows(run, "UpdateArrived")[:2]
    edit_body(run, first.seq, lambda body: body.__setitem__("adapter", other.body["adapter"]))
    result = alignfed.replay(run)
    assert result.divergence is not None


def test_an_upload_that_was_not_kept_is_named_with_the_remedy(run: Path) -> None:
    upload = rows(run, "UpdateArrived")[0]
    edit_body(run, upload.seq, lambda body: body.pop("adapter"))
    with pytest.raises(JournalError, match=r"was not kept.*--keep-payloads"):
        alignfed.replay(run)


def test_a_changed_recipe_is_refused(run: Path) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("buffer_size = 2", "buffer_size = 3"))
    with pytest.raises(JournalError, match="not the recipe the run was begun with"):
        alignfed.replay(run)


def test_a_run_of_a_version_that_kept_nothing_is_refused(run: Path) -> None:
    change(run, "DELETE FROM meta WHERE key = 'replay'")
    with pytest.raises(JournalError, match="kept no uploads"):
        alignfed.replay(run)


# --- elsewhere --------------------------------------------------------------------------------


def test_elsewhere_last_bits_may_differ_and_more_may_not(run: Path) -> None:
    publish = rows(run, "Publish")[1]

    def nudge(share: float) -> Callable[[dict[str, Any]], None]:
        def edit(body: dict[str, Any]) -> None:
            body["applied"][0][4] *= 1 + share

        return edit

    edit_body(run, publish.seq, nudge(1e-6))
    assert alignfed.replay(run).divergence is not None
    change(
        run,
        "UPDATE meta SET value = replace(value, 'torch', 'another torch') WHERE key = 'replay'",
    )
    result = alignfed.replay(run)
    assert (result.divergence, result.exact, result.tolerance) == (None, False, 1e-4)
    outcome = CliRunner().invoke(app, ["replay", str(run)])
    assert outcome.exit_code == 0 and "reproduced, within 0.0001" in outcome.output
    assert alignfed.replay(run, tolerance=0.0).divergence is not None
    edit_body(run, publish.seq, nudge(0.01))
    assert alignfed.replay(run).divergence is not None
    with pytest.raises(AlignFedError, match="tolerance is -1"):
        alignfed.replay(run, tolerance=-1.0)


def test_elsewhere_an_adapter_is_measured_and_not_hashed(run: Path) -> None:
    from alignfed.core.adapter import Adapter
    from alignfed.journal.blobs import BlobStore

    publish = rows(run, "Publish")[1]
    blobs = BlobStore(run / "checkpoints")
    adapter = blobs.adapter(publish.body["adapter"])

    def moved_by(share: float) -> Adapter:
        return Adapter(
            adapter.layout, {dtype: data * (1 + share) for dtype, data in adapter.buffers.items()}
        )

    for share, same in ((1e-6, True), (1e-2, False)):
        other = moved_by(share)
        blobs.put_adapter(other.checksum, other)
        edit_body(run, publish.seq, lambda body, to=other: body.update(adapter=to.checksum))
        assert (alignfed.replay(run, tolerance=1e-4).divergence is None) == same
