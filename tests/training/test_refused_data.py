"""Data that would be trained on or dealt without sense is refused by row, column and remedy."""

import pytest

from alignfed.errors import DataError
from alignfed.training.data import DataSettings
from alignfed.training.federate import federate_files, federate_pool
from alignfed.training.partition import PartitionSettings
from alignfed.training.templates import TemplateSettings
from tests.training.test_data import IID, TEMPLATE, records


@pytest.mark.parametrize("blank", ["", "  \n", None])
def test_a_blank_response_is_refused_by_row_and_column(blank):
    pool = records(40)
    pool[7]["answer"] = blank
    for template in (TEMPLATE, TemplateSettings("{question}", "Answer: {answer}")):
        with pytest.raises(DataError, match="row 7: column 'answer' is blank") as caught:
            federate_pool(pool, DataSettings(calibration_examples=0), template, IID)
        assert caught.value.row == 7


def test_a_blank_class_label_is_refused_and_does_not_become_a_class():
    pool = [{"text": f"text {i}", "label": ("yes", "no")[i % 2]} for i in range(40)]
    pool[3]["label"] = " "
    wanted = DataSettings(label_column="label", calibration_examples=0)
    with pytest.raises(DataError, match=r"'label' .* is blank in row 3; fill it in or remove"):
        federate_pool(pool, wanted, TemplateSettings("{text}"), IID)


def test_data_of_one_content_is_refused_as_duplicates():
    pool = [{"question": "same", "answer": "same"} for _ in range(50)]
    wanted = DataSettings(calibration_examples=8)
    with pytest.raises(DataError, match="of 50 examples only 1 differ in content"):
        federate_pool(pool, wanted, TEMPLATE, IID)
    with pytest.raises(DataError, match="of 50 examples only 1 differ in content"):
        federate_files({"a": pool[:25], "b": pool[25:]}, wanted, TEMPLATE)


@pytest.mark.parametrize("kind", ["dirichlet", "shard", "natural"])
def test_a_column_of_fractions_is_no_column_to_deal_by(kind):
    pool = [{**one, "score": i + 0.5} for i, one in enumerate(records(60))]
    deal = PartitionSettings(kind, num_clients=4, column="score")
    with pytest.raises(DataError, match=r"'score' holds the number .*text or whole numbers") as no:
        federate_pool(pool, DataSettings(calibration_examples=0), TEMPLATE, deal)
    assert "PartitionSettings" not in str(no.value)
