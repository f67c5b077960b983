"""The paper's experiments on the quantisers (arXiv 2504.19874), repeated with this package.

    python docs/paper/reproduce.py

writes ``figures.json`` and three PNG files beside this file (``--output`` another folder), in about
two minutes on two cores. All is computed from fixed seeds. What is shown and what the data are:
``docs/paper/README.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import time
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from turboquant_cpp import _core

Rows = NDArray[np.float32]

#: Paper, section 3 (theorems 1 and 2) and section 3.3 (theorem 3), for unit vectors.
MSE_UPPER = math.sqrt(3) * math.pi / 2
PROD_UPPER = math.sqrt(3) * math.pi**2
PQ_CENTROIDS = 256  # one byte a subspace, as in the paper's comparison
PQ_ITERATIONS = 12
METHODS = ("mse", "prod", "prod-orthogonal", "mse-unbiased")
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
COLOURS = {
    "mse": "#2563a8",
    "prod": "#d97706",
    "prod-orthogonal": "#8b5cb5",
    "mse-unbiased": "#2f8f5b",
    "pq": "#8a8f98",
}
LABELS = {
    "mse": "Mse",
    "prod": "Prod, Gaussian projection (the paper's)",
    "prod-orthogonal": "Prod, orthogonal projection",
    "mse-unbiased": "Mse, unbiased scale",
    "pq": "product quantisation",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is drawn; `vectors` are quantised once for each of `seeds` rotations."""

    dim: int = 128
    vectors: int = 2048
    seeds: int = 32
    queries: int = 64
    database: int = 20_000
    clusters: int = 400
    searches: int = 1000


def quantizer(method: str, dim: int, bits: int, seed: int) -> Any:
    """One of `METHODS`: encode, decode."""
    if method == "prod":
        return _core.TurboQuantProd(dim, bits, seed, projection="gaussian")
    if method == "prod-orthogonal":
        return _core.TurboQuantProd(dim, bits, seed)
    return _core.TurboQuantMse(dim, bits, seed, "unbiased" if method == "mse-unbiased" else "norm")


def widths(method: str, most: int) -> range:
    """Prod spends one bit on the sign of the residual."""
    return range(2 if method.startswith("prod") else 1, most + 1)


def unit(rows: NDArray[Any]) -> Rows:
    """Rows of length 1."""
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def distortion(sizes: Sizes) -> list[dict[str, Any]]:
    """Squared error of vectors and of inner products, both of unit vectors, against the bounds."""
    source = np.random.default_rng(1)
    x = unit(source.standard_normal((sizes.vectors, sizes.dim)))
    queries = unit(source.standard_normal((sizes.queries, sizes.dim)))
    found = []
    for method in METHODS[:3]:
        for bits in widths(method, 5):
            squares, products = [], []
            for seed in range(sizes.seeds):
                own = quantizer(method, sizes.dim, bits, seed)
                error = own.decode(own.encode(x)) - x
                squares.append(np.square(error).sum(1).mean())
                products.append(np.square(error @ queries.T).mean())
            found.append(
                {
                    "method": method,
                    "bits": bits,
                    "squared_error": float(np.mean(squares)),
                    "product_error_times_dim": float(np.mean(products) * sizes.dim),
                    "exact_optimum": _core.solve_lloyd_max(sizes.dim, bits)["distortion"],
                    "mse_upper_bound": MSE_UPPER * 4.0**-bits,
                    "product_upper_bound_times_dim": PROD_UPPER * 4.0**-bits,
                    "lower_bound": 4.0**-bits,
                }
            )
    return found


def product_errors(method: str, bits: int, cosine: float, sizes: Sizes) -> NDArray[np.float64]:
    """Errors of the estimated products of pairs of unit vectors at a given angle, a row a seed."""
    source = np.random.default_rng(2)
    x, other = (unit(source.standard_normal((sizes.vectors, sizes.dim))) for _ in range(2))
    across = unit(other - (other * x).sum(1, keepdims=True) * x)
    y = cosine * x + math.sqrt(1 - cosine**2) * across
    errors = []
    for seed in range(sizes.seeds):
        own = quantizer(method, sizes.dim, bits, seed)
        errors.append(((own.decode(own.encode(x)) - x).astype(np.float64) * y).sum(1))
    return np.stack(errors)


def inner_products(sizes: Sizes) -> list[dict[str, Any]]:
    """Bias and variance of estimated products, by width and by the product itself."""
    found = []
    for method in METHODS:
        for bits in (2, 3, 4):
            for cosine in (0.0, 0.3, 0.6):
                errors = product_errors(method, bits, cosine, sizes)
                by_seed = errors.mean(1)  # vectors share a seed's rotation, so seeds are the sample
                found.append(
                    {
                        "method": method,
                        "bits": bits,
                        "product": cosine,
                        "bias": float(by_seed.mean()),
                        "bias_standard_error": float(by_seed.std(ddof=1) / sizes.seeds**0.5),
                        "variance_times_dim": float(errors.var() * sizes.dim),
                    }
                )
    return found


def clustered(sizes: Sizes) -> tuple[Rows, Rows]:
    """Database and queries: unit vectors around random centres, energy falling as 1 / direction.

    Made, not real: directions of unequal energy mixed by a random rotation, as embeddings have
    them. Queries come from the same clusters and are not in the database.
    """
    source = np.random.default_rng(3)
    spread = np.arange(1, sizes.dim + 1) ** -0.5
    mix = np.linalg.qr(source.standard_normal((sizes.dim, sizes.dim)))[0]
    centres = source.standard_normal((sizes.clusters, sizes.dim))
    total = sizes.database + sizes.searches
    members = centres[source.integers(sizes.clusters, size=total)]
    rows = unit((members + 0.7 * source.standard_normal(members.shape)) * spread @ mix)
    return rows[: sizes.database], rows[sizes.database :]


def product_quantised(rows: Rows, bits: int) -> Rows:
    """Rows through product quantisation: k-means with 256 centroids a subspace, trained on them."""
    source = np.random.default_rng(4)
    width = 8 // bits
    parts = []
    for part in np.split(rows, rows.shape[1] // width, axis=1):
        count = min(PQ_CENTROIDS, len(part))
        centroids = part[source.choice(len(part), count, replace=False)]
        for iteration in range(PQ_ITERATIONS + 1):
            # |x|^2 is the same for every centroid.
            nearest = (part @ centroids.T - np.square(centroids).sum(1) / 2).argmax(1)
            if iteration < PQ_ITERATIONS:
                counts = np.bincount(nearest, minlength=count)
                sums = [np.bincount(nearest, column, minlength=count) for column in part.T]
                means = np.stack(sums, 1) / np.maximum(counts, 1)[:, None]
                centroids = np.where(counts[:, None] > 0, means, centroids).astype(np.float32)
        parts.append(centroids[nearest])
    return np.concatenate(parts, axis=1)


def recall(sizes: Sizes) -> list[dict[str, Any]]:
    """How often the nearest neighbour is among the k best by estimated products (1@k)."""
    database, queries = clustered(sizes)
    nearest = (queries @ database.T).argmax(1)
    found = []
    for bits in (2, 4):
        for method in (*METHODS, "pq"):
            if method == "pq":
                coded = product_quantised(database, bits)
            else:
                own = quantizer(method, sizes.dim, bits, 0)
                coded = own.decode(own.encode(database))
            scores = queries @ coded.T
            best = np.take_along_axis(scores, nearest[:, None], axis=1)
            ranks = (scores > best).sum(1)
            for k in (1, 2, 4, 8, 16, 32, 64):
                share = float((ranks < k).mean())
                found.append({"method": method, "bits": bits, "k": k, "recall": share})
    return found


def draw_distortion(found: list[dict[str, Any]], sizes: Sizes) -> Figure:
    """Both distortions against bits, with upper and lower bounds."""
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    panels = (
        ("squared_error", "mse_upper_bound", ("mse",), "squared error of a unit vector"),
        (
            "product_error_times_dim",
            "product_upper_bound_times_dim",
            ("prod", "prod-orthogonal", "mse"),
            f"squared error of an inner product, times d = {sizes.dim}",
        ),
    )
    for index, (field, upper, methods, title) in enumerate(panels, start=1):
        axis = figure.add_subplot(1, 2, index)
        axis.set_title(title, loc="left")
        bits = range(1, 6)
        bounds = {row["bits"]: row for row in found}
        axis.plot(bits, [bounds[b][upper] for b in bits], "k--", label="the paper's upper bound")
        axis.plot(
            bits,
            [bounds[b]["lower_bound"] for b in bits],
            "k:",
            label="lower bound of any quantiser",
        )
        for method in methods:
            rows = [row for row in found if row["method"] == method]
            axis.plot(
                [row["bits"] for row in rows],
                [row[field] for row in rows],
                "o-",
                color=COLOURS[method],
                label=LABELS[method],
                linewidth=1.2,
                markersize=4,
            )
        axis.set_yscale("log")
        axis.set_xticks(bits)
        axis.set_xlabel("bits a coordinate")
        axis.set_ylim(bottom=1e-4)  # room for the legend
        axis.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def draw_inner_products(sizes: Sizes) -> Figure:
    """Histograms of the error at 2 bits, a column for each product."""
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    bins = np.linspace(-0.2, 0.2, 81)
    for line, method in enumerate(("prod", "mse")):
        for column, cosine in enumerate((0.0, 0.3, 0.6)):
            axis = figure.add_subplot(2, 3, 3 * line + column + 1)
            errors = product_errors(method, 2, cosine, sizes).ravel()
            axis.hist(errors, bins=bins, density=True, color=COLOURS[method])
            axis.axvline(errors.mean(), color="black", linewidth=1)
            name = LABELS[method].split(",")[0]
            axis.set_title(f"{name}, product {cosine}: mean {errors.mean():+.4f}", loc="left")
            axis.set_yticks([])
    figure.supxlabel("estimated product less the product, 2 bits", fontsize=9)
    return figure


def draw_recall(found: list[dict[str, Any]]) -> Figure:
    """Recall against k, a panel a width."""
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    for index, bits in enumerate((2, 4), start=1):
        axis = figure.add_subplot(1, 2, index)
        axis.set_title(f"{bits} bits: recall 1@k", loc="left")
        for method in (*METHODS, "pq"):
            rows = [row for row in found if (row["method"], row["bits"]) == (method, bits)]
            axis.plot(
                [row["k"] for row in rows],
                [row["recall"] for row in rows],
                "o-",
                color=COLOURS[method],
                label=LABELS[method],
                linewidth=1.2,
                markersize=3,
            )
        axis.set_xscale("log", base=2)
        axis.set_xlabel("k")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def reproduce(sizes: Sizes, output: pathlib.Path) -> dict[str, Any]:
    """Run all experiments, write the figures, return what ``figures.json`` holds."""
    output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"sizes": dataclasses.asdict(sizes)}
    with mpl.rc_context(STYLE):
        for step, name in enumerate(("distortion", "inner_products", "recall"), start=1):
            began = time.monotonic()
            print(f"[{step}/3] {name} ...", end=" ", flush=True)
            if name == "distortion":
                report[name] = distortion(sizes)
                figure = draw_distortion(report[name], sizes)
            elif name == "inner_products":
                report[name] = inner_products(sizes)
                figure = draw_inner_products(sizes)
            else:
                report[name] = recall(sizes)
                figure = draw_recall(report[name])
            figure.savefig(output / f"{name}.png", dpi=110, metadata={"Software": None})
            print(f"{time.monotonic() - began:.0f} s", flush=True)
    (output / "figures.json").write_text(json.dumps(_rounded(report), indent=1) + "\n", "utf-8")
    return report


def _rounded(value: Any) -> Any:
    """Five digits: what lies beyond depends on the order of a machine's additions."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description="Repeat the paper's experiments on quantisers.")
    here = pathlib.Path(__file__).parent
    parser.add_argument("--output", type=pathlib.Path, default=here, help="folder for the figures")
    reproduce(Sizes(), parser.parse_args().output)


if __name__ == "__main__":
    main()
