"""The look of the plots in the notebooks, and their alternative texts."""

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#1f5fa8", "#d98324", "#2d8a4e", "#c0392b", "#7d3c98", "#8a8a8a"


def set_style() -> None:
    """Set the style of all plots of a notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 90,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, GREY]),
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
    )


def show(figure: Figure, alt: str) -> None:
    """Show a figure once, with an alternative text for readers who do not see it.

    Args:
        figure: The figure. It is closed.
        alt: What the figure shows. It is stored with the picture in the notebook.
    """
    figure.tight_layout()
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)
