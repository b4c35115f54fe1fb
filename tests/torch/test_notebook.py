"""What results show of themselves: text in a terminal, small HTML in a notebook, which is checked as a tree."""

from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.wording import notebook

TABLE = ("table", "thead", "tbody", "tr", "th", "td")


class Odd(nn.Linear):
    """Its class is renamed to what would be markup."""


Odd.__name__ = '<b>Odd & "odd"\''


def results():
    torch.manual_seed(0)
    model = dt.cast(nn.Sequential(nn.Linear(4, 4), Odd(4, 2)), "fp16")
    optimizers = [dt.SGD(part.parameters(), lr=0.1) for part in model]
    scaler = dt.LossScaler("fp16")
    scaler.backward(model(torch.ones(1, 4)).sum() / 100)
    report = scaler.step(*optimizers)
    return dt.explain(model, torch.ones(1, 4)), dt.memory(model, optimizers[0]), report


@pytest.fixture(scope="module")
def shown():
    return results()


def tree(result):
    # a space that does not break is no entity of XML's
    return ElementTree.fromstring(result._repr_html_().replace("&nbsp;", " ").replace("<br>", "<br/>"))


def text_of(element):
    return " ".join("".join(element.itertext()).split())


@pytest.mark.parametrize("which", range(3))
def test_html_is_well_formed_and_leaves_colours_to_the_page(shown, which):
    root = tree(shown[which])
    tags = {element.tag for element in root.iter()}
    assert tags <= {"div", "strong", "p", "ul", "li", "details", "summary", "br", *TABLE}
    styles = " ".join(element.get("style", "") for element in root.iter())
    assert "background" not in styles
    assert not styles.startswith("color")
    assert ";color" not in styles
    assert len(shown[which]._repr_html_()) < 20_000


def test_text_is_escaped(shown):
    explanation = shown[0]
    assert "<b>" not in explanation._repr_html_()
    assert Odd.__name__ in text_of(tree(explanation))
    assert notebook.bullets(["a < b"]) == '<ul style="margin:0.3em 0"><li>a &lt; b</li></ul>'


def test_an_explanation_shows_findings_and_unfolds_tables(shown):
    explanation = shown[0]
    root = tree(explanation)
    assert text_of(root[0]) == explanation.header()
    assert [text_of(item) for item in root.iter("li")] == [" ".join(each.split()) for each in explanation.findings]
    assert [text_of(each).partition(":")[0] for each in root.iter("summary")] == [t.title for t in explanation.tables()]
    assert all(each.get("open") is None for each in root.iter("details"))
    assert repr(explanation) == str(explanation)


def test_memory_is_a_line_and_a_table(shown):
    memory = shown[1]
    start = "6 bytes for each of 30 parameters: weights 60 B, tails 60 B, gradients 60 B, moments 0 B, other "
    assert str(memory).startswith(start)
    rows = [[text_of(cell) for cell in row] for row in tree(memory).iter("tr")]
    assert rows[:3] == [["", "bytes", "per parameter"], ["weights", "60 B", "2"], ["tails", "60 B", "2"]]
    assert repr(memory).startswith("Memory(parameters=30, weights_bytes=60")

    class Printer:
        said = ""

        def text(self, text):
            self.said += text

    printer = Printer()
    memory._repr_pretty_(printer, False)
    assert printer.said == str(memory)
    assert str(dt.memory(nn.Identity())).startswith("0 bytes for each of 0 parameters: weights 0 B")


def test_a_report_shows_numbers(shown):
    report = shown[2]
    norm = f"{report.grad_norm.item():.6g}"
    assert repr(report) == (
        f"StepReport(skipped=False, grad_norm={norm}, loss_scale=65536, skipped_each=[False, False])"
    )
    rows = [[text_of(cell) for cell in row] for row in tree(report).iter("tr")]
    assert rows[0] == ["skipped", "grad_norm", "loss_scale", "skipped_each"]
    assert rows[1][::2] == ["False", "65536"]


def test_a_report_without_gradients_shows_itself():
    report = dt.LossScaler("bf16").step(dt.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    assert repr(report) == "StepReport(skipped=False, grad_norm=0, loss_scale=1)"
