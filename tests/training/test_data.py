import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.errors import DataError
from alignfed.training.data import (
    ClientData,
    DataSettings,
    FederatedData,
    check_disjoint,
    content_keys,
)
from alignfed.training.federate import federate_files, federate_pool, load_data
from alignfed.training.partition import PartitionSettings
from alignfed.training.templates import Example, TemplateSettings

TEMPLATE = TemplateSettings("{question}", "{answer}")
IID = PartitionSettings("iid", num_clients=4)


def records(count, start=0):
    return [
        {"question": f"q {i}", "answer": f"a {i}", "topic": i % 3}
        for i in range(start, start + count)
    ]


def everything(data):
    held = [one for client in data.clients.values() for one in (*client.train, *client.held_out)]
    return [*held, *data.evaluation, *data.calibration]


def test_a_pool_is_split_whole_and_disjoint():
    data = federate_pool(records(200), DataSettings(calibration_examples=20), TEMPLATE, IID)
    assert len(data.evaluation) == 20
    assert len(data.calibration) == 20
    assert [len(client.train) + len(client.held_out) for client in data.clients.values()] == [
        40
    ] * 4
    assert [len(client.held_out) for client in data.clients.values()] == [4] * 4
    assert len(content_keys(everything(data))) == 200
    assert data.removed == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=60, max_size=120),
    st.integers(0, 5),
    st.integers(0, 2**20),
)
def test_shared_content_never_survives_on_two_sides(numbers, calibration, seed):
    # Few different contents, so duplicates fall everywhere; spacing and case disguise them.
    pool = [
        {"question": f"  Q {n}" if i % 2 else f"q  {n} ", "answer": "A" if i % 3 else "a"}
        for i, n in enumerate(numbers)
    ]
    wanted = DataSettings(calibration_examples=calibration, seed=seed, evaluation_fraction=0.05)
    try:
        data = federate_pool(pool, wanted, TEMPLATE, PartitionSettings("iid", 2, seed=seed))
    except DataError as error:
        assert "wanted" in str(error) or "keeps 0" in str(error) or "do not give" in str(error)
        return
    evaluation, reserved = content_keys(data.evaluation), content_keys(data.calibration)
    held_out = {key for client in data.clients.values() for key in content_keys(client.held_out)}
    train = {key for client in data.clients.values() for key in content_keys(client.train)}
    assert not evaluation & reserved
    assert not (evaluation | reserved) & (held_out | train)
    assert not held_out & train
    assert len(everything(data)) + data.removed == len(pool)


@pytest.mark.parametrize("side", ["evaluation", "calibration", "held_out"])
def test_the_check_refuses_any_overlap(side):
    shared = Example("Same  text", "x")
    client = ClientData("one", (Example("same text", "X"),), (Example("own", "y"),))
    data = FederatedData({0: client}, (Example("e", "e"),), (Example("c", "c"),))
    check_disjoint(data)
    if side == "held_out":
        other = ClientData("two", (Example("t", "t"),), (shared,))
        data = replace(data, clients={0: client, 1: other})
    else:
        data = replace(data, **{side: (shared,)})
    with pytest.raises(DataError, match="share 1"):
        check_disjoint(data)


def test_evaluation_and_calibration_may_not_overlap_either():
    client = ClientData("one", (Example("t", "t"),), ())
    with pytest.raises(DataError, match="share 1"):
        check_disjoint(FederatedData({0: client}, (Example("a", "b"),), (Example("A", "b"),)))


def test_duplicates_of_a_given_evaluation_set_leave_the_clients_and_are_counted():
    data = federate_pool(
        records(100),
        DataSettings(calibration_examples=0),
        TEMPLATE,
        IID,
        evaluation=records(30, start=90),
    )
    assert data.removed == 10
    assert len(data.evaluation) == 30


def test_the_same_seed_gives_the_same_data_and_another_does_not():
    def make(seed):
        return federate_pool(records(200), DataSettings(seed=seed), TEMPLATE, IID)

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_a_client_more_leaves_the_others_held_out_slices_alone():
    def make(names):
        files = {name: records(20, start=1000 * i) for i, name in enumerate(names)}
        return federate_files(
            files, DataSettings(calibration_examples=2), TEMPLATE, evaluation=records(9, 9000)
        )

    two, three = make(["a", "b"]), make(["a", "b", "c"])
    assert two.clients[0] == three.clients[0]
    assert two.clients[1] == three.clients[1]


def test_calibration_of_clients_with_files_comes_out_of_evaluation():
    data = federate_files(
        {"a": records(20), "b": records(20, 100)},
        DataSettings(calibration_examples=5),
        TEMPLATE,
        evaluation=records(25, 1000),
    )
    assert len(data.evaluation) == 20
    assert len(data.calibration) == 5
    assert content_keys(data.evaluation + data.calibration) == content_keys(
        Example(one["question"], one["answer"]) for one in records(25, 1000)
    )
    assert "evaluation" in data.calibration_source


def test_limits_are_kept():
    wanted = DataSettings(
        evaluation_examples=7,
        calibration_examples=3,
        held_out_examples=2,
        max_examples_per_client=11,
    )
    data = federate_pool(records(200), wanted, TEMPLATE, IID)
    assert len(data.evaluation) == 7
    for client in data.clients.values():
        assert len(client.held_out) == 1  # a tenth of eleven
        assert len(client.train) == 10


def test_labels_are_indexed_in_sorted_order_and_strangers_refused():
    pool = [{"text": f"t{i}", "label": ("b", "a", "c")[i % 3]} for i in range(60)]
    template = TemplateSettings("{text}")
    wanted = DataSettings(label_column="label", calibration_examples=3)
    data = federate_pool(pool, wanted, template, IID)
    assert data.label_names == ("a", "b", "c")
    for one in everything(data):
        assert one.label == (1, 0, 2)[int(one.prompt[1:]) % 3]
    with pytest.raises(DataError, match="'c' is not one of the 2"):
        federate_pool(pool, replace(wanted, label_names=("a", "b")), template, IID)


def test_whole_number_labels_sort_as_numbers():
    pool = [{"text": f"t{i}", "label": i % 12} for i in range(60)]
    wanted = DataSettings(label_column="label", calibration_examples=3)
    data = federate_pool(pool, wanted, TemplateSettings("{text}"), IID)
    assert data.label_names == tuple(str(i) for i in range(12))


def test_a_classifier_counts_the_text_alone_as_content():
    pool = [{"text": f"t{i % 30}", "label": i % 2} for i in range(60)]
    wanted = DataSettings(label_column="label", calibration_examples=2)
    data = federate_pool(pool, wanted, TemplateSettings("{text}"), PartitionSettings("iid", 2))
    assert data.removed > 0


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def test_a_folder_with_one_file_a_client(tmp_path):
    for client in range(3):
        write(tmp_path, f"local_{client}.json", records(20, start=100 * client))
    write(tmp_path, "test.json", records(15, start=1000))
    wanted = DataSettings(
        str(tmp_path), clients="local_*.json", evaluation="test.json", calibration_examples=5
    )
    data = load_data(wanted, TEMPLATE, PartitionSettings("files"))
    assert [client.name for client in data.clients.values()] == ["local_0", "local_1", "local_2"]
    assert len(data.evaluation) == 10
    two = load_data(wanted, TEMPLATE, PartitionSettings("files", num_clients=2))
    assert list(two.clients) == [0, 1]
    with pytest.raises(DataError, match="3 files"):
        load_data(wanted, TEMPLATE, PartitionSettings("files", num_clients=4))


def test_clients_with_files_give_up_a_share_where_no_evaluation_file_is_named(tmp_path):
    for client in range(3):
        write(tmp_path, f"local_{client}.json", records(20, start=100 * client))
    wanted = DataSettings(str(tmp_path), clients="local_*.json", calibration_examples=2)
    data = load_data(wanted, TEMPLATE, PartitionSettings("files"))
    assert len(data.evaluation) + len(data.calibration) == 6
    assert len(content_keys(everything(data))) == 60


def test_a_folder_with_a_pool_and_an_evaluation_file(tmp_path):
    write(tmp_path, "train.json", records(60))
    write(tmp_path, "test.json", records(15, start=1000))
    wanted = DataSettings(str(tmp_path), evaluation="test.json", calibration_examples=5)
    data = load_data(wanted, TEMPLATE, IID)
    assert len(data.evaluation) == 15
    assert sum(len(c.train) + len(c.held_out) for c in data.clients.values()) == 55


@pytest.mark.parametrize(
    ("changes", "deal", "message"),
    [
        ({"path": "no/such/place.json"}, IID, "does not exist"),
        ({"path": "./nowhere"}, IID, "does not exist"),
        ({"train": "trian.json"}, IID, r"did you mean 'train\.json'"),
        ({"evaluation": "tset.json"}, IID, r"did you mean 'test\.json'"),
        ({"clients": "local_*.json"}, PartitionSettings("files"), "matches"),
        ({}, PartitionSettings("files"), "data.clients"),
        ({}, PartitionSettings("natural", column="tpoic"), "did you mean 'topic'"),
        ({"label_column": "lable"}, IID, "no column 'lable'"),
        ({"explode": "question"}, IID, "not lists"),
        ({"calibration_examples": 500}, IID, "500 wanted"),
        ({"evaluation_fraction": 0.0}, IID, "evaluation set is empty"),
        ({}, PartitionSettings("iid", num_clients=90), "do not give 90 clients"),
    ],
)
def test_wrong_data_settings_are_refused_with_the_remedy(tmp_path, changes, deal, message):
    write(tmp_path, "train.json", records(60))
    write(tmp_path, "test.json", records(15, start=1000))
    wanted = replace(DataSettings(str(tmp_path), calibration_examples=5), **changes)
    with pytest.raises(DataError, match=message):
        load_data(wanted, TEMPLATE, deal)


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation_fraction": 1.0},
        {"held_out_fraction": -0.1},
        {"calibration_examples": -1},
        {"held_out_examples": 0},
        {"seed": -1},
        {"label_names": ("a",)},
    ],
)
def test_impossible_values_are_refused(changes):
    with pytest.raises(DataError):
        DataSettings(**changes)


def test_a_row_without_text_is_refused_by_number():
    pool = [*records(30), {"question": " ", "answer": None, "topic": 0}]
    with pytest.raises(DataError, match="row 30 gives no text"):
        federate_pool(pool, DataSettings(), TEMPLATE, IID)


def test_a_row_without_a_value_to_deal_by_is_refused_by_number():
    pool = [*records(30), {"question": "x", "answer": "y", "topic": None}]
    with pytest.raises(DataError, match="no value in row 30"):
        federate_pool(pool, DataSettings(), TEMPLATE, PartitionSettings("natural", column="topic"))
