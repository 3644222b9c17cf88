// The values under the pointer, or where the arrow keys move, in the legend of each chart.
"use strict";
const { end, charts } = JSON.parse(document.getElementById("values").textContent);

const shown = (value, unit) => {
  const size = Math.abs(value), digits = size < 1000 ? 4 : 1;
  if (unit) return value.toFixed(2) + unit;
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toPrecision(3);
  const exactly = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return value.toLocaleString("en-US", exactly);
};
const nearest = (steps, step) => {
  const away = (place) => Math.abs(steps[place] - step);
  return steps.reduce((best, _, place) => (away(place) < away(best) ? place : best), 0);
};

document.querySelectorAll("[data-chart]").forEach((figure) => {
  const { low, high, unit, series } = charts[figure.dataset.chart];
  const plot = figure.querySelector(".plot"), svg = plot.querySelector("svg");
  const told = [figure.querySelector(".at"), ...figure.querySelectorAll(".legend b")];
  const before = told.map((one) => one.textContent), height = svg.height.baseVal.value;
  const { steps: all } = series.reduce((a, b) => (b.steps.length > a.steps.length ? b : a));
  let drawn = [], place = all.length - 1;

  const draw = (name, attributes) => {
    const made = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    svg.append(made);
    drawn.push(made);
  };
  const leave = () => {
    drawn.forEach((one) => one.remove());
    drawn = [];
    told.forEach((one, i) => { one.textContent = before[i]; });
  };
  const show = (step) => {
    leave();
    place = nearest(all, step);
    const x = `${(100 * all[place]) / end}%`;
    draw("line", { class: "cursor", x1: x, x2: x, y1: 0, y2: height });
    series.forEach(({ role, steps, values }, i) => {
      if (!steps.length) return;
      const here = nearest(steps, all[place]), cx = `${(100 * steps[here]) / end}%`;
      const cy = height * (1 - (values[here] - low) / (high - low));
      draw("circle", { class: `dot ${role}`, r: 4, cx, cy });
      told[i + 1].textContent = shown(values[here], unit);
    });
    told[0].textContent = `step ${all[place].toLocaleString("en-US")}`;
  };

  plot.tabIndex = 0;
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    show((end * (event.clientX - box.left)) / box.width);
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    show(all[Math.max(0, Math.min(all.length - 1, place + move))]);
  });
});

addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
});
