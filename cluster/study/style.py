"""How a study's figures look: colours, type, and the names of metrics."""

from typing import Any

import matplotlib
import numpy as np

from cluster.metrics import METRICS
from cluster.study.spec import Study

INK, GREY, BLANK = "#1d2430", "#9aa5b4", "#eef0f3"
# Categories: Okabe and Ito's colours, told apart by the colour-blind; no yellow, too light.
CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE: Any = {"font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8.5,
         "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
         "axes.grid": True, "axes.axisbelow": True, "grid.color": "#dfe3e9", "grid.linewidth": 0.6,
         "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
         "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK,
         "ytick.labelcolor": INK, "text.usetex": False, "text.parse_math": False,
         "lines.linewidth": 1.5, "lines.solid_capstyle": "round",
         "font.family": "DejaVu Sans"}  # fmt: skip
NAMES = {
    "step": "updates",
    "reward_eval": "reward (fresh rollouts)",
    "reward_mean": "reward (training)",
    "kl_to_generator": r"KL($\pi_\theta\,\Vert\,\pi_\mathrm{gen}$), nats/token",
    "kl_from_generator": r"KL($\pi_\mathrm{gen}\,\Vert\,\pi_\theta$), nats/token",
    "kl_to_reference": r"KL($\pi_\theta\,\Vert\,\pi_\mathrm{ref}$), nats/token",
    "eval_kl_to_reference": r"KL($\pi_\theta\,\Vert\,\pi_\mathrm{ref}$), nats/token",
    "ess": "effective sample size, fraction",
    "age": "age, optimizer steps",
    "seconds": "seconds",
    "queries": "rewards queried",
}


def colours(study: Study, axis: str) -> dict[str, Any]:
    """A colour of each label of an axis, the same in all figures: from dark to light where the
    labels are numbers."""
    labels = list(study.axes[axis])
    try:
        order = sorted(labels, key=float)
    except ValueError:
        many = [matplotlib.colormaps["tab20"](i % 20) for i in range(len(labels))]
        return dict(zip(labels, CATEGORIES if len(labels) <= len(CATEGORIES) else many))
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(order)))
    return dict(zip(order, [tuple(shade) for shade in shades]))


def name(metric: str) -> str:
    """A metric as a label of an axis, with its unit."""
    unit = next((m.unit for m in METRICS if m.name == metric), "")
    return NAMES.get(metric, f"{metric}, {unit}" if unit else metric)
