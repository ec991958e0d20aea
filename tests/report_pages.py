"""Results for the report, and its page as a browser would read it."""

import itertools
import json
import re
from html.parser import HTMLParser

from benchmarks.fixtures.generated import generate_result
from prunebench.results.report.data import build_report
from prunebench.results.report.page import render_page
from prunebench.results.schema import LayerSparsity, TrainingBlock, TrainingPoint
from prunebench.spec import RunSpec
from tests.factories import make_result

EVIL = "<img src=x onerror=alert(1)>"


def generated(model="m", method="wanda", **spec):
    run = RunSpec(model=model, method=method, model_revision="sha256:" + "0" * 64, **spec)
    return generate_result(run, blocks=3)


def mixed(model="m"):
    """Seeds, sparsities, N:M, an allocation, perplexities and accuracies, layers."""
    rows = [
        generated(model, method, sparsity=sparsity, seed=seed)
        for method, sparsity, seed in itertools.product(
            ("wanda", "sparsegpt"), ("0.4", "0.6", "2:4"), range(2)
        )
    ]
    return [*rows, generated(model, "sparsegpt", sparsity="0.6", allocation="owl")]


def with_training(seed, held_out):
    """A learned mask, with the held-out perplexity at every step."""
    curve = [
        TrainingPoint(
            step=step, tokens=64 * step, loss=None, temperature=1.0, scale=1.0, certainty=0.9,
            changed=0.0, held_out_ppl=ppl, seconds=1.0,
        )
        for step, ppl in enumerate(held_out)
    ]  # fmt: skip
    training = TrainingBlock(
        text="c4-sample/rest", origin="wheel:x", windows=9, held_out_windows=2, seqlen=64,
        tokens_sha256="0" * 64, best_step=2, processes=1, curve=curve,
    )  # fmt: skip
    made = make_result(method="maskllm", sparsity="2:4", value=50.0, seed=seed)
    return made.model_copy(update={"training": training})


def page_of(results, **how):
    return render_page(build_report(results, **how))


def data_of(page):
    """What the page's script reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def scored(model, column=0):
    """The rows of a model with their scores in a column, as the page's script joins them."""
    scores = model["scores"][model["columns"][column]["key"]]
    return [row | scores[row["id"]] for row in model["rows"] if row["id"] in scores]


class Page(HTMLParser):
    """What a browser would make of the page, as far as the tests ask."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.links, self.ids, self._open = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "srcset", "data", "xlink:href", "poster"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def layer(name, zeros, *, size=(4, 5), loss=None):
    return LayerSparsity(
        name=name, out_features=size[0], in_features=size[1], requested="0.5", zeros=zeros,
        loss=loss,
    )  # fmt: skip


# ---------------------------------------------------------------- layers


def with_layers(layers, **spec):
    result = generated("m", "sparsegpt", **spec)
    sparsity = result.sparsity.model_copy(update={"layers": layers})
    return result.model_copy(update={"sparsity": sparsity})
