
"use strict";
// Tooltips with the values at the pointer, or at the step chosen with the arrow keys. Curves and tables work without it.

function nearest(points, x) {
  let best = null;
  for (const point of points) {
    if (best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
  }
  return best;
}

function row(className, label, text) {
  const line = document.createElement("div");
  if (className) {
    const mark = document.createElement("i");
    mark.className = className;
    line.append(mark);
  }
  const name = document.createElement("span");
  name.textContent = label;
  const value = document.createElement("b");
  value.textContent = text;
  line.append(name, value);
  return line;
}

function attach(svg) {
  const traces = JSON.parse(svg.dataset.points).filter((trace) => trace.points.length);
  const tip = svg.parentElement.querySelector(".tip");
  const cross = svg.querySelector(".cross");
  const positions = [...new Set(traces.flatMap((trace) => trace.points.map((point) => point[0])))].sort((a, b) => a - b);
  const width = svg.viewBox.baseVal.width;
  let current = -1;

  function hide() {
    tip.hidden = true;
    cross.setAttribute("visibility", "hidden");
  }

  function show(x) {
    const found = traces.map((trace) => ({ trace, point: nearest(trace.points, x) }));
    const closest = found.reduce((a, b) => (Math.abs(b.point[0] - x) < Math.abs(a.point[0] - x) ? b : a)).point;
    current = positions.indexOf(closest[0]);
    cross.setAttribute("transform", `translate(${closest[0]} 0)`);
    cross.setAttribute("visibility", "visible");
    tip.replaceChildren(row("", "step", closest[1]));
    for (const { trace, point } of found) {
      const label = point[1] === closest[1] ? trace.label : `${trace.label}, step ${point[1]}`;
      tip.append(row(`c${trace.colour}`, label, point[2]));
    }
    tip.hidden = false;
    const available = svg.clientWidth;
    const left = (closest[0] / width) * available;
    const fits = left + 14 + tip.offsetWidth <= available;
    tip.style.left = `${fits ? left + 14 : Math.max(0, left - 14 - tip.offsetWidth)}px`;
  }

  if (!positions.length) return;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    show(((event.clientX - box.left) / box.width) * width);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!move) return;
    event.preventDefault();
    show(positions[Math.min(positions.length - 1, Math.max(0, current + move))]);
  });
}

for (const svg of document.querySelectorAll("svg[data-points]")) attach(svg);
