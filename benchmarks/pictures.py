"""Line charts of the benchmarks. matplotlib is imported where it draws: nothing else needs it."""


def save_curves(path, plots, *, x_label, y_label, log_x=False, log_y=False, references=None):
    """Plots {title: {label: (x values, y values)}} of the same labels side by side, and in each of them thin levels,
    references {label: y}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 7 * len(plots), 5.5), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots.items(), strict=True):
        for i, (label, (x, y)) in enumerate(curves.items()):
            axes.plot(x, y, color=f"C{i % 10}", linestyle="-" if i < 10 else "--", label=label)
        for i, (label, y) in enumerate((references or {}).items()):
            axes.axhline(y, color="black", linewidth=0.8, linestyle=("-", ":")[i % 2], label=label)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
        for axis in (axes.xaxis, axes.yaxis):  # 40, not 4 x 10^1
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path)
