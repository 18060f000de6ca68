"""Line charts of the benchmarks. matplotlib is imported where it draws: nothing else needs it."""


def save_curves(path, plots, *, x_label, y_label, log_x=False, log_y=False, references=None):
    """Plots {title: {label: (x values, y values)}} side by side, with one legend, and thin levels: references
    {label: y}. A label has the same colour in each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 7 * len(plots), 5.5), layout="constrained")
    every = {}  # label: what is drawn
    labels = list(dict.fromkeys(label for curves in plots.values() for label in curves))
    for axes, (title, curves) in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots.items(), strict=True):
        for label, (x, y) in curves.items():
            i = labels.index(label)  # of ten colours, and from the eleventh on dashed
            (every[label],) = axes.plot(x, y, color=f"C{i % 10}", linestyle="-" if i < 10 else "--")
        for i, (label, level) in enumerate((references or {}).items()):
            every[label] = axes.axhline(level, color="black", linewidth=0.8, linestyle=("-", ":")[i % 2])
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        axes.grid(alpha=0.3)
    figure.legend(every.values(), every.keys(), loc="outside right upper")
    figure.savefig(path)
