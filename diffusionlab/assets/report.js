"use strict";
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = event.message; });

  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 480, HEIGHT = 264, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 40;
  const colour = (i) => `var(--c${i % 10})`;

  function make(name, attributes = {}, text) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function add(parent, name, className, text) {
    const node = parent.appendChild(document.createElement(name));
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function format(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }

  // Round steps of 1, 2 or 5 times a power of ten.
  function linearTicks(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
    const ticks = [];
    for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
    return ticks;
  }
  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    const factors = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
    const every = Math.max(1, Math.ceil(decades / 6)), ticks = [];
    for (let p = Math.floor(Math.log10(low)); 10 ** p <= high; p += every)
      for (const f of factors) if (f * 10 ** p >= low && f * 10 ** p <= high) ticks.push(f * 10 ** p);
    return ticks;
  }

  // One axis: where a value lies, from `from` to `to` pixels, and its ticks.
  function axis(values, from, to, log, count, margin) {
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) { const d = Math.abs(low) * 0.1 || 1; low -= log ? low / 2 : d; high += d; }
    const map = log ? Math.log : (v) => v;
    const room = (map(high) - map(low)) * margin;
    const a = map(low) - room, b = map(high) + room;
    const unmap = log ? Math.exp : (v) => v;
    let ticks = log ? logTicks(unmap(a), unmap(b)) : linearTicks(unmap(a), unmap(b), count);
    if (log && ticks.length < 2) ticks = linearTicks(unmap(a), unmap(b), count).filter((v) => v > 0);
    return { ticks, at: (v) => from + ((map(v) - a) / (b - a)) * (to - from) };
  }

  function chart(parent, spec) {
    const box = add(parent, "div", "chart"), head = add(box, "header");
    add(head, "b", "", spec.title);
    const several = spec.series.length > 1;
    if (!several) add(head, "small", "", format(last(spec.series[0].points)[1]));
    const values = spec.series.flatMap((s) => s.points.map((p) => p[1])).filter((y) => y !== null);
    // Bands of many lines would hide each other.
    if (spec.series.length > 4) for (const series of spec.series) series.band = [];
    const button = Math.min(...values) > 0 ? add(head, "button") : null;
    let svg = add(box, "div");
    if (several) {
      const legend = add(box, "div", "legend");
      spec.series.forEach((series, i) => {
        const item = add(legend, "span");
        add(item, "i").style.background = colour(i);
        item.append(series.name);
      });
    }
    const draw = () => {
      const drawn = plot(box, spec, values);
      svg.replaceWith(drawn);
      svg = drawn;
      if (button) button.textContent = spec.log ? "log" : "linear";
    };
    if (button) {
      button.type = "button";
      button.title = "switch the vertical axis";
      button.onclick = () => { spec.log = !spec.log; draw(); };
    }
    draw();
  }
  const last = (points) => points.filter((p) => p[1] !== null).at(-1);

  function plot(box, spec, values) {
    const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": spec.title });
    const xs = spec.series.flatMap((s) => s.points.map((p) => p[0]));
    const x = axis(xs, LEFT, WIDTH - RIGHT, false, 5, 0.01);
    const ends = spec.series.flatMap((s) => (s.band || []).flatMap((b) => [b[1], b[2]]));
    const shown = values.concat(ends.filter((v) => !spec.log || v > 0));
    const y = axis(shown, HEIGHT - BOTTOM, TOP, spec.log, 4, 0.06);
    for (const tick of y.ticks) {
      const at = y.at(tick);
      svg.append(make("line", { class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }));
      svg.append(make("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, format(tick)));
    }
    for (const tick of x.ticks) {
      const label = Math.abs(tick) >= 1e4 ? `${format(tick / 1e3)}k` : format(tick);
      svg.append(make("text", { x: x.at(tick), y: HEIGHT - 24, "text-anchor": "middle" }, label));
    }
    svg.append(make("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 7, "text-anchor": "middle" }, spec.x));
    spec.series.forEach((series, i) => {
      // On a logarithmic axis a band that reaches 0 ends at the bottom.
      const height = (v) => (spec.log && v <= 0 ? HEIGHT - BOTTOM : y.at(v)).toFixed(1);
      const band = series.band || [], edge = (k) => band.map((b) => `${x.at(b[0]).toFixed(1)},${height(b[k])}`);
      if (band.length > 1)
        svg.append(make("polygon", { class: "band", points: [...edge(1), ...edge(2).reverse()].join(" "), style: `fill:${colour(i)}` }));
      let path = "", pen = "M";
      for (const [px, py] of series.points) {
        if (py === null) { pen = "M"; continue; }
        path += `${pen}${x.at(px).toFixed(1)},${y.at(py).toFixed(1)}`;
        pen = "L";
        if (series.points.length < 30)
          svg.append(make("circle", { cx: x.at(px), cy: y.at(py), r: 2.4, style: `fill:${colour(i)}` }));
      }
      svg.append(make("path", { d: path, style: `stroke:${colour(i)}` }));
    });
    hover(box, svg, spec, x);
    return svg;
  }

  function hover(box, svg, spec, x) {
    const cursor = make("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    svg.append(cursor);
    let tip = null;
    const hide = () => { tip?.remove(); tip = null; cursor.setAttribute("visibility", "hidden"); };
    svg.onpointerleave = hide;
    svg.onpointermove = (event) => {
      const frame = svg.getBoundingClientRect();
      const at = ((event.clientX - frame.left) / frame.width) * WIDTH;
      const near = (points) => points.reduce((best, p) =>
        p[1] !== null && (!best || Math.abs(x.at(p[0]) - at) < Math.abs(x.at(best[0]) - at)) ? p : best, null);
      const found = spec.series.map((s) => near(s.points));
      const place = found.find((p) => p);
      if (!place) return;
      hide();
      tip = add(box, "div", "tip");
      add(tip, "div", "", `${spec.x} ${place[0].toLocaleString("en")}`);
      found.forEach((point, i) => {
        if (!point) return;
        const row = add(tip, "div");
        add(row, "i").style.background = colour(i);
        row.append(found.length > 1 ? `${spec.series[i].name}: ${format(point[1])}` : format(point[1]));
        const ends = (spec.series[i].band || []).find((b) => b[0] === point[0]);
        if (ends) row.append(` [${format(ends[1])}, ${format(ends[2])}]`);
      });
      const px = x.at(place[0]);
      cursor.setAttribute("x1", px);
      cursor.setAttribute("x2", px);
      cursor.setAttribute("visibility", "visible");
      const left = (px / WIDTH) * frame.width;
      const flip = left > frame.width / 2;
      tip.style.left = `${flip ? left - tip.offsetWidth - 10 : left + 10}px`;
      tip.style.top = "34px";
    };
  }

  function slider(box) {
    const frames = [...box.querySelectorAll("img")];
    const range = box.querySelector("input"), button = box.querySelector("button");
    const output = box.querySelector("output");
    let timer = 0;
    const show = (index) => {
      frames.forEach((frame, i) => { frame.hidden = i !== index; });
      range.value = index;
      output.textContent = `step ${frames[index].dataset.step}`;
    };
    const stop = () => { clearInterval(timer); timer = 0; button.textContent = "▶"; };
    range.oninput = () => { stop(); show(Number(range.value)); };
    button.onclick = () => {
      if (timer) return stop();
      let index = Number(range.value) === frames.length - 1 ? 0 : Number(range.value);
      button.textContent = "❚❚";
      show(index);
      timer = setInterval(() => {
        if (index === frames.length - 1) return stop();
        show(++index);
      }, 450);
    };
  }

  const data = JSON.parse(document.getElementById("data").textContent);
  for (const box of document.querySelectorAll(".charts"))
    for (const spec of data[box.dataset.from]) chart(box, spec);
  document.querySelectorAll(".slider").forEach(slider);
  root.dataset.ready = String(document.querySelectorAll(".chart svg").length);
})();
