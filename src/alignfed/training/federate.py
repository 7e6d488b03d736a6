"""From records to clients: what is set aside, how the rest is dealt, what is removed.

Every choice is drawn from the settings' seed. The rules of who keeps shared content are in
``data.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from alignfed.errors import DataError
from alignfed.training.data import (
    ClientData,
    DataSettings,
    FederatedData,
    check_disjoint,
    content_key,
    content_keys,
)
from alignfed.training.formatting import make_formatter
from alignfed.training.partition import PartitionSettings, partition
from alignfed.training.sources import (
    Record,
    column_values,
    explode,
    find_files,
    looks_local,
    read_file,
    read_hub,
)
from alignfed.training.streams import generator
from alignfed.training.templates import Example, TemplateSettings


def load_data(
    data: DataSettings, template: TemplateSettings, deal: PartitionSettings
) -> FederatedData:
    """Read, format, split and deal what the settings name.

    Raises:
        DataError: files, columns or values that do not fit, each named with the nearest one.
    """
    folder = Path(data.path).expanduser()
    if deal.kind == "files":
        if data.path and not folder.exists():
            raise DataError(
                f"data.path {data.path!r} does not exist; name the folder that holds one file a"
                " client",
                path=data.path,
            )
        if not folder.is_dir() or data.clients is None:
            raise DataError(
                f"partition kind 'files' needs a folder in data.path (it is {data.path!r}) and a"
                " glob in data.clients, for example 'client_*.json'"
            )
        files = find_files(folder, data.clients)
        if deal.num_clients is not None:
            if len(files) < deal.num_clients:
                raise DataError(
                    f"{folder} has {len(files)} files that match {data.clients!r},"
                    f" {deal.num_clients} clients wanted",
                    num_clients=len(files),
                )
            files = files[: deal.num_clients]
        return federate_files(
            {path.stem: read_file(path) for path in files},
            data,
            template,
            evaluation=_named_evaluation(folder, data),
            min_size=deal.min_size,
        )
    if folder.exists():
        return federate_pool(
            _pool(folder, data), data, template, deal, evaluation=_named_evaluation(folder, data)
        )
    if looks_local(data.path) or not data.path:
        # read_file says what is missing and what lies near it.
        return federate_pool(read_file(folder), data, template, deal)
    pool = read_hub(data.path, data.subset, data.split)
    evaluation = (
        None if data.evaluation is None else read_hub(data.path, data.subset, data.evaluation)
    )
    return federate_pool(pool, data, template, deal, evaluation=evaluation)


def federate_pool(
    pool: Sequence[Record],
    data: DataSettings,
    template: TemplateSettings,
    deal: PartitionSettings,
    *,
    evaluation: Sequence[Record] | None = None,
    calibration: Sequence[Record] | None = None,
) -> FederatedData:
    """Deal one pool of records to clients, after taking evaluation and calibration out of it.

    Args:
        pool: records to deal.
        data: sizes, label column and seed; its paths are not looked at.
        template: how a record becomes text.
        deal: how the pool is dealt.
        evaluation: records of the evaluation set; None takes ``evaluation_fraction`` of the pool.
        calibration: records of the calibration set; None draws from the pool.

    Raises:
        DataError: columns or values that do not fit, or too few examples.
    """
    source = data.path or "the data"
    records = explode(pool, data.explode, source) if data.explode else list(pool)
    shown = _exploded(evaluation, data, "the evaluation set")
    formatter = make_formatter(data, template, [*records, *(shown or ()), *(calibration or ())])
    examples = formatter(records, source)
    values = column_values(records, deal.column, source) if deal.column is not None else None
    rest = [int(row) for row in generator(data.seed, "splits").permutation(len(examples))]
    if shown is None:
        count = round(data.evaluation_fraction * len(examples))
        count = min(count, data.evaluation_examples or count)
        chosen = [examples[row] for row in rest[:count]]
        rest = rest[count:]
        evaluation_source = "a share of the pool, taken out before it was dealt"
    else:
        chosen = _limited(formatter(shown, "the evaluation set"), data)
        evaluation_source = "a set of its own"
    taken = content_keys(chosen)
    if calibration is None:
        calibrating, rest = _draw_distinct(examples, rest, taken, data.calibration_examples)
        calibration_source = "the pool, taken out before it was dealt"
    else:
        given = formatter(calibration, "the calibration set")
        calibrating = [one for one in given if content_key(one) not in taken]
        calibrating = calibrating[: data.calibration_examples]
        calibration_source = "a set of its own"
    _require_examples(chosen, calibrating, data, examples)
    taken |= content_keys(calibrating)
    kept = sorted(row for row in rest if content_key(examples[row]) not in taken)
    shares = partition(len(kept), values and [values[row] for row in kept], deal)
    holdings = [(share.name, [examples[kept[i]] for i in share.rows]) for share in shares]
    return _assemble(
        holdings,
        chosen,
        calibrating,
        data,
        formatter.label_names,
        removed=len(rest) - len(kept),
        min_size=1,
        sources=(evaluation_source, calibration_source),
    )


def federate_files(
    clients: Mapping[str, Sequence[Record]],
    data: DataSettings,
    template: TemplateSettings,
    *,
    evaluation: Sequence[Record] | None = None,
    min_size: int = 1,
) -> FederatedData:
    """Take records that already belong to clients, by the client's name.

    The calibration set comes out of the evaluation set: no client's file is the server's to keep.

    Raises:
        DataError: columns or values that do not fit, or too few examples.
    """
    named = {
        name: explode(records, data.explode, name) if data.explode else list(records)
        for name, records in clients.items()
    }
    shown = _exploded(evaluation, data, "the evaluation set")
    every = [record for records in named.values() for record in records]
    formatter = make_formatter(data, template, [*every, *(shown or ())])
    holdings = [(name, formatter(records, name)) for name, records in named.items()]
    every_example = [one for _, examples in holdings for one in examples]
    if shown is None:
        chosen = []
        for client, (name, examples) in enumerate(holdings):
            rows = generator(data.seed, "evaluation", client).permutation(len(examples))
            count = round(data.evaluation_fraction * len(examples))
            chosen += [examples[row] for row in rows[:count]]
            holdings[client] = (name, [examples[row] for row in sorted(rows[count:])])
        evaluation_source = "a share of each client's file, taken from the client"
    else:
        chosen = formatter(shown, "the evaluation set")
        evaluation_source = "a set of its own"
    order = [int(row) for row in generator(data.seed, "splits").permutation(len(chosen))]
    calibrating, _ = _draw_distinct(chosen, order, set(), data.calibration_examples)
    taken = content_keys(calibrating)
    chosen = _limited([one for one in chosen if content_key(one) not in taken], data)
    _require_examples(chosen, calibrating, data, every_example)
    return _assemble(
        holdings,
        chosen,
        calibrating,
        data,
        formatter.label_names,
        removed=0,
        min_size=min_size,
        sources=(evaluation_source, "the evaluation set, which no longer holds it"),
    )


def own_client(
    name: str,
    client_id: int,
    data: DataSettings,
    template: TemplateSettings,
) -> tuple[ClientData, tuple[str, ...]]:
    """Return one client that holds what ``data.path`` names, and a classifier's classes.

    Nobody else's data is known here: evaluation and calibration are the server's, and keeping them
    apart from this client's examples is up to those who collect them.

    Raises:
        DataError: files, columns or values that do not fit, too few examples, or a classifier
            whose classes the recipe does not name.
    """
    if data.label_column is not None and data.label_names is None:
        raise DataError(
            "a classifier's devices must agree on its classes; name them all in data.label_names"
        )
    path = Path(data.path).expanduser()
    records: Sequence[Record] = _pool(path, data) if path.is_dir() else read_file(path)
    records = _exploded(records, data, name) or ()
    formatter = make_formatter(data, template, records)
    examples = formatter(records, name)
    order = generator(data.seed, "held-out", client_id).permutation(len(examples))
    order = order[: data.max_examples_per_client]
    count = _held_out_count(len(order), data)
    kept = tuple(examples[row] for row in order[:count])
    taken = content_keys(kept)
    train = tuple(examples[row] for row in order[count:] if content_key(examples[row]) not in taken)
    if not train:
        raise DataError(
            f"{path} leaves {name} nothing to train on: it holds {len(examples)} examples, of which"
            f" {len(kept)} are held out; add examples or lower data.held_out_fraction",
            path=str(path),
        )
    return ClientData(name, train, kept), formatter.label_names


def server_examples(
    path: Path, source: str, data: DataSettings, template: TemplateSettings
) -> list[Example]:
    """Return the examples in a file of the server's own, each content once.

    Args:
        path: the file.
        source: what it is, for errors.
        data: column of labels and their names, and of what is to be exploded.
        template: how a record becomes text.

    Raises:
        DataError: files, columns or values that do not fit, or a classifier whose classes the
            recipe does not name.
    """
    if data.label_column is not None and data.label_names is None:
        raise DataError(
            "server and devices must agree on a classifier's classes; name them all in"
            " data.label_names"
        )
    records = _exploded(read_file(path), data, source) or ()
    examples = make_formatter(data, template, records)(records, source)
    return list({content_key(one): one for one in examples}.values())


def _assemble(
    holdings: Sequence[tuple[str, Sequence[Example]]],
    evaluation: Sequence[Example],
    calibration: Sequence[Example],
    data: DataSettings,
    label_names: tuple[str, ...],
    *,
    removed: int,
    min_size: int,
    sources: tuple[str, str],
) -> FederatedData:
    """Cut each client's held-out slice and remove from the clients what others keep."""
    taken = content_keys(evaluation) | content_keys(calibration)
    slices: list[tuple[str, list[Example], list[Example]]] = []
    for client, (name, examples) in enumerate(holdings):
        clean = [one for one in examples if content_key(one) not in taken]
        removed += len(examples) - len(clean)
        order = generator(data.seed, "held-out", client).permutation(len(clean))
        order = order[: data.max_examples_per_client]
        count = _held_out_count(len(order), data)
        slices.append(
            (name, [clean[row] for row in order[:count]], [clean[row] for row in order[count:]])
        )
    held_out = {content_key(one) for _, kept, _ in slices for one in kept}
    clients = {}
    for client, (name, kept, rest) in enumerate(slices):
        train = tuple(one for one in rest if content_key(one) not in held_out)
        removed += len(rest) - len(train)
        if not train or len(train) + len(kept) < min_size:
            raise DataError(
                f"client {client} ({name}) keeps {len(train)} training examples (and"
                f" {len(kept)} held out) after {len(holdings[client][1]) - len(train) - len(kept)}"
                f" duplicates and examples over max_examples_per_client were removed;"
                f" at least 1 and min_size {min_size} are needed",
                client_id=client,
            )
        clients[client] = ClientData(name, train, tuple(kept))
    result = FederatedData(
        clients, tuple(evaluation), tuple(calibration), label_names, removed, *sources
    )
    check_disjoint(result)
    return result


def _held_out_count(num_examples: int, data: DataSettings) -> int:
    if data.held_out_fraction == 0 or num_examples < 2:
        return 0
    count = min(max(1, round(data.held_out_fraction * num_examples)), num_examples - 1)
    return min(count, data.held_out_examples or count)


def _draw_distinct(
    examples: Sequence[Example], order: Sequence[int], taken: set[bytes], count: int
) -> tuple[list[Example], list[int]]:
    """Take the first ``count`` examples of new content; return them and the rows left."""
    seen = set(taken)
    drawn: list[Example] = []
    left: list[int] = []
    for row in order:
        key = content_key(examples[row])
        if len(drawn) < count and key not in seen:
            seen.add(key)
            drawn.append(examples[row])
        else:
            left.append(row)
    return drawn, left


def _limited(examples: list[Example], data: DataSettings) -> list[Example]:
    if data.evaluation_examples is None or len(examples) <= data.evaluation_examples:
        return examples
    order = generator(data.seed, "evaluation").permutation(len(examples))
    return [examples[row] for row in sorted(order[: data.evaluation_examples])]


def _require_examples(
    evaluation: Sequence[Example],
    calibration: Sequence[Example],
    data: DataSettings,
    every: Sequence[Example],
) -> None:
    if not evaluation or len(calibration) < data.calibration_examples:
        distinct = len(content_keys(every))
        if 2 * distinct <= len(every):
            raise DataError(
                f"of {len(every)} examples only {distinct} differ in content (case and spacing"
                " aside), too few to set any aside; check that data.template.prompt names the"
                " columns that differ, or remove the duplicates",
                num_examples=len(every),
                distinct=distinct,
            )
    if not evaluation:
        raise DataError(
            "the evaluation set is empty; name data.evaluation or raise data.evaluation_fraction"
            f" (now {data.evaluation_fraction}), or lower data.calibration_examples"
            f" (now {data.calibration_examples}) where calibration comes out of it"
        )
    if len(calibration) < data.calibration_examples:
        raise DataError(
            f"only {len(calibration)} examples of their own are left for the calibration set,"
            f" {data.calibration_examples} wanted; lower data.calibration_examples",
            num_examples=len(calibration),
        )


def _exploded(
    records: Sequence[Record] | None, data: DataSettings, source: str
) -> Sequence[Record] | None:
    if records is None or data.explode is None:
        return records
    return explode(records, data.explode, source)


def _pool(path: Path, data: DataSettings) -> list[Record]:
    if path.is_file():
        return read_file(path)
    pattern = data.train or "train.*"
    files = find_files(path, pattern)
    if data.train is None and len(files) > 1:
        raise DataError(
            f"{path} holds {', '.join(file.name for file in files)}; name one in data.train",
            path=str(path),
        )
    return [record for file in files for record in read_file(file)]


def _named_evaluation(path: Path, data: DataSettings) -> list[Record] | None:
    if data.evaluation is None:
        return None
    folder = path if path.is_dir() else path.parent
    direct = Path(data.evaluation).expanduser()
    files = [direct] if direct.is_file() else find_files(folder, data.evaluation)
    return [record for file in files for record in read_file(file)]
