// The values under the pointer, or at the place that the arrow keys move, in the legend of each chart.
"use strict";
const { end, charts } = JSON.parse(document.getElementById("values").textContent);

const shown = (value, unit) => {
  if (unit) return value.toFixed(2) + unit;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toPrecision(3);
  return value.toLocaleString("en-US", { minimumFractionDigits: size < 1000 ? 4 : 1, maximumFractionDigits: size < 1000 ? 4 : 1 });
};
const nearest = (steps, step) => {
  let best = 0;
  steps.forEach((one, place) => { if (Math.abs(one - step) < Math.abs(steps[best] - step)) best = place; });
  return best;
};
const drawn = (svg, name, attributes) => {
  const made = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  svg.append(made);
  return made;
};

document.querySelectorAll("[data-chart]").forEach((figure) => {
  const { low, high, unit, series } = charts[figure.dataset.chart];
  const plot = figure.querySelector(".plot"), svg = plot.querySelector("svg"), said = figure.querySelector(".at");
  const values = [...figure.querySelectorAll(".legend b")], before = values.map((one) => one.textContent), text = said.textContent;
  const longest = series.reduce((one, other) => (other.steps.length > one.steps.length ? other : one));
  const height = svg.height.baseVal.value;
  let cursor = [], place = longest.steps.length - 1;

  const leave = () => {
    cursor.forEach((one) => one.remove());
    cursor = [];
    said.textContent = text;
    values.forEach((one, i) => { one.textContent = before[i]; });
  };
  const show = (step) => {
    leave();
    place = nearest(longest.steps, step);
    const at = longest.steps[place], across = `${(100 * at) / end}%`;
    cursor.push(drawn(svg, "line", { class: "cursor", x1: across, x2: across, y1: 0, y2: height }));
    series.forEach(({ role, steps, values: found }, i) => {
      if (!steps.length) return;
      const here = nearest(steps, at);
      values[i].textContent = shown(found[here], unit);
      cursor.push(drawn(svg, "circle", { class: `dot ${role}`, r: 4, cx: `${(100 * steps[here]) / end}%`, cy: height * (1 - (found[here] - low) / (high - low)) }));
    });
    said.textContent = `step ${at.toLocaleString("en-US")}`;
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
    show(longest.steps[Math.max(0, Math.min(longest.steps.length - 1, place + move))]);
  });
});

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
