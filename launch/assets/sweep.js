"use strict";
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = event.message; });

  const data = JSON.parse(document.getElementById("data").textContent);
  const trials = data.trials, chosen = new Set();
  const failed = new Set(data.failed);
  const SLOT = 24; // pixels of a place apart, for what has no value
  const SPAN = 30; // from this ratio on an axis is logarithmic

  function add(parent, name, className, text) {
    const node = parent.appendChild(document.createElement(name));
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function draw(parent, name, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return parent.appendChild(node);
  }
  function format(value) {
    if (typeof value !== "number") return String(value);
    const size = Math.abs(value);
    if (size !== 0 && (size >= 1e6 || size < 1e-4)) return String(Number(value.toPrecision(3)).toExponential()).replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }
  const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
  const spread = (list, limit) => list.filter((_, i) => i % Math.ceil(list.length / Math.max(1, limit)) === 0);

  // ---- Scales: where a value lies between two ends, in pixels.

  function ticksOf(low, high, log, limit) {
    if (log) {
      const decades = Math.log10(high / low), ticks = [];
      const factors = decades > limit / 2 ? [1] : decades > limit / 3 ? [1, 3] : [1, 2, 5];
      for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
        for (const factor of factors) ticks.push(Number((factor * 10 ** power).toPrecision(1)));
      const inside = ticks.filter((tick) => tick >= low && tick <= high);
      if (inside.length > 1) return spread(inside, limit);
    }
    const rough = (high - low) / limit, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const count = Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) + 1;
    return Array.from({ length: count }, (_, i) => (Math.ceil(low / step - 1e-9) + i) * step);
  }
  const wide = (values, span = SPAN) => Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > span;

  // Numbers on a line, other values as categories; `slots` are places apart at the start.
  // Where there are but few numbers, `exact` makes them the ticks.
  function scale(values, from, to, room, { log, slots = [], margin = 0.04, exact = false } = {}) {
    const sign = Math.sign(to - from), known = values.filter((value) => value !== null);
    if (known.length < values.length && !slots.length) slots = ["none"];
    const start = from + sign * SLOT * slots.length, limit = Math.max(2, Math.floor(Math.abs(to - start) / room));
    const apart = slots.map((name, i) => ({ at: from + sign * SLOT * (i + 0.3), label: name, apart: true }));
    const slot = (name) => (apart.find((tick) => tick.label === name) || apart[0]).at;
    if (!known.every((value) => typeof value === "number")) {
      const names = [...new Set(known.map(String))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      const at = (value) => (value === null ? slot("none") : start + ((names.indexOf(String(value)) + 0.5) / names.length) * (to - start));
      return { at, slot, log: false, ticks: [...apart, ...spread(names, limit).map((name) => ({ at: at(name), label: name }))] };
    }
    if (!known.length) return { at: () => slot("none"), slot, log: false, ticks: apart };
    if (log === undefined) log = wide(known);
    let low = Math.min(...known), high = Math.max(...known);
    if (low === high) { const d = Math.abs(low) / 10 || 1; low -= log ? low / 2 : d; high += d; }
    const map = log ? Math.log : (v) => v, unmap = log ? Math.exp : (v) => v;
    const extra = (map(high) - map(low)) * margin, a = map(low) - extra, b = map(high) + extra;
    const at = (value) => (value === null ? slot("none") : start + ((map(value) - a) / (b - a)) * (to - start));
    const distinct = [...new Set(known)].sort((p, q) => p - q);
    const shown = exact && distinct.length < 9 ? distinct : ticksOf(unmap(a), unmap(b), log, limit);
    const apartEnough = (tick, i) => i === 0 || Math.abs(at(tick) - at(shown[i - 1])) > room / 3;
    const ticks = shown.filter(apartEnough).map((tick) => ({ at: at(tick), label: format(tick) }));
    return { at, slot, log, ticks: [...apart, ...ticks] };
  }

  // ---- Colours: a variable of the page for each trial, by one of its numbers.

  const RAMP = ["--c0", "--c4", "--c3", "--c1"];
  function ramp(part) {
    const place = Math.min(Math.max(part, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(place), RAMP.length - 2);
    return `color-mix(in oklab, var(${RAMP[i + 1]}) ${((place - i) * 100).toFixed(1)}%, var(${RAMP[i]}))`;
  }
  const valueOf = (name) => (trial) => (name === data.metric ? trial.value : trial.overrides[name]);
  function paint(name, legend) {
    legend.replaceChildren();
    const known = trials.map(valueOf(name)).filter((value) => value !== null);
    const numeric = known.length && known.every((value) => typeof value === "number");
    const axis = scale(known, 0, 1, 1, { margin: 0, log: numeric && wide(known, 5) });
    const names = [...new Set(known.map(String))];
    const colour = (value, i) => {
      if (name === "") return `var(--c${i % 10})`;
      if (value === null) return "var(--soft)";
      return numeric ? ramp(axis.at(value)) : `var(--c${names.indexOf(String(value)) % 10})`;
    };
    trials.forEach((trial, i) => root.style.setProperty(`--t${i}`, colour(name && valueOf(name)(trial), i)));
    if (numeric && name !== "") {
      legend.append(format(Math.min(...known)));
      add(legend, "i", "ramp");
      legend.append(format(Math.max(...known)));
    } else if (name !== "")
      names.slice(0, 10).forEach((text, i) => {
        const item = add(legend, "span");
        add(item, "i").style.background = `var(--c${i % 10})`;
        item.append(cut(text, 24));
      });
  }

  // ---- Marks: what stands for a trial, in every plot and table.

  function mark() {
    for (const plot of document.querySelectorAll(".plot")) {
      plot.classList.toggle("some", chosen.size > 0);
      for (const node of plot.querySelectorAll(".mark")) {
        const on = chosen.has(Number(node.dataset.trial));
        node.classList.toggle("on", on);
        if (on) node.parentNode.append(node);
      }
    }
    for (const row of document.querySelectorAll("tr[data-trials]")) {
      const all = row.dataset.trials.split(" ").every((i) => chosen.has(Number(i)));
      row.classList.toggle("chosen", all);
      row.querySelector(".pick")?.setAttribute("aria-pressed", String(all));
    }
  }
  function toggle(places) {
    const all = places.every((i) => chosen.has(i));
    for (const i of places) if (all) chosen.delete(i); else chosen.add(i);
    mark();
  }

  // The nearest line or point gets a box that names its trial; a click chooses it.
  // `paths` are {trial, points: [[x, y], ...], say: (index) -> text}.
  function hover(box, svg, paths) {
    let tip = null, near = null;
    const hide = () => {
      tip?.remove();
      svg.querySelectorAll(".near").forEach((node) => node.classList.remove("near"));
      tip = near = null;
    };
    const distance = (p, q, x, y) => {
      const dx = q[0] - p[0], dy = q[1] - p[1], length = dx * dx + dy * dy;
      const part = length ? Math.min(1, Math.max(0, ((x - p[0]) * dx + (y - p[1]) * dy) / length)) : 0;
      return { far: Math.hypot(p[0] + part * dx - x, p[1] + part * dy - y), next: part > 0.5 };
    };
    svg.onpointerleave = hide;
    svg.onpointermove = (event) => {
      const frame = svg.getBoundingClientRect(), x = event.clientX - frame.left, y = event.clientY - frame.top;
      let best = { far: 40 };
      for (const path of paths)
        path.points.forEach((p, i) => {
          const q = path.points[i + 1] || p;
          if (p[1] === null || q[1] === null) return;
          const { far, next } = distance(p, q, x, y);
          if (far < best.far) best = { far, path, index: next && q !== p ? i + 1 : i };
        });
      hide();
      if (!best.path) return;
      near = best.path.trial;
      for (const node of svg.querySelectorAll(`.mark[data-trial="${near}"]`)) {
        node.classList.add("near");
        node.parentNode.append(node);
      }
      const trial = trials[near];
      tip = add(box, "div", "tip");
      add(tip, "b", "", trial.name);
      add(tip, "div", "", best.path.say(best.index));
      for (const [name, value] of Object.entries(trial.overrides))
        if (value !== null) add(tip, "div", "", `${name} = ${format(value)}`);
      if (trial.state !== "done") add(tip, "div", "", trial.state);
      const at = best.path.points[best.index][0], width = box.clientWidth;
      tip.style.left = `${at > width / 2 ? Math.max(0, at - tip.offsetWidth - 12) : at + 12}px`;
      tip.style.top = `${Math.max(0, Math.min(y - 20, box.clientHeight - tip.offsetHeight))}px`;
    };
    svg.onclick = () => { if (near !== null) toggle([near]); };
  }

  function canvas(box, height, label) {
    box.replaceChildren();
    const width = Math.max(320, box.clientWidth);
    const svg = draw(box, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
    box.classList.toggle("crowded", trials.length > 30);
    return { svg, width };
  }
  const broken = (i) => (failed.has(trials[i].state) ? " broken" : "");
  function line(svg, i, points) {
    let path = "", pen = "M";
    for (const [x, y] of points) {
      if (y === null) { pen = "M"; continue; }
      path += `${pen}${x.toFixed(1)},${y.toFixed(1)}`;
      pen = "L";
    }
    draw(svg, "path", { class: `mark${broken(i)}`, d: path, style: `stroke:var(--t${i})`, "data-trial": i });
  }
  function point(svg, i, x, y, filled) {
    const style = filled ? `fill:var(--t${i})` : `stroke:var(--t${i})`;
    draw(svg, "circle", { class: `mark${filled ? " filled" : ""}`, cx: x.toFixed(1), cy: y.toFixed(1), r: filled ? 4.5 : 4, style, "data-trial": i });
  }
  function rules(svg, axis, left, right) {
    for (const tick of axis.ticks) {
      draw(svg, "line", { class: "rule", x1: left, x2: right, y1: tick.at, y2: tick.at });
      draw(svg, "text", { class: tick.apart ? "apart" : "", x: left - 8, y: tick.at + 4, "text-anchor": "end" }, cut(tick.label, 12));
    }
  }
  function below(svg, axis, height) {
    for (const tick of axis.ticks)
      draw(svg, "text", { class: tick.apart ? "apart" : "", x: tick.at, y: height - 30, "text-anchor": "middle" }, cut(tick.label, 14));
  }

  // ---- The curves of all trials over steps.

  function curves(box, name, log) {
    const found = Object.entries(data.curves[name]).map(([i, flat]) => {
      const points = [];
      for (let k = 0; k < flat.length; k += 2) points.push([flat[k], flat[k + 1]]);
      return [Number(i), points];
    });
    const height = 400, { svg, width } = canvas(box, height, `${name} over steps`), left = 70;
    const all = found.flatMap(([, points]) => points).filter((p) => p[1] !== null);
    const x = scale(all.map((p) => p[0]), left, width - 16, 90, { log: false, margin: 0.01 });
    const y = scale(all.map((p) => p[1]), height - 50, 12, 45, { log });
    rules(svg, y, left, width - 16);
    below(svg, x, height);
    draw(svg, "text", { x: (left + width) / 2, y: height - 8, "text-anchor": "middle" }, "step");
    const marks = draw(svg, "g", {});
    const paths = found.map(([trial, points]) => {
      const placed = points.map(([step, value]) => [x.at(step), value === null ? null : y.at(value)]);
      return { trial, points: placed, say: (k) => `${name}: ${format(points[k][1])} at step ${points[k][0].toLocaleString("en")}` };
    });
    for (const { trial, points } of paths) {
      line(marks, trial, points);
      const drawn = points.filter((p) => p[1] !== null);
      if (drawn.length < 12 && (found.length <= 30 || drawn.length === 1)) for (const [px, py] of drawn) point(marks, trial, px, py, true);
    }
    hover(box, svg, paths);
  }

  // ---- Overrides against the metric.

  // What has no final value stands apart, under the word that says why.
  const apartOf = (trial) => {
    if (trial.state === "done") return trial.value === null ? "no value" : null;
    return failed.has(trial.state) ? trial.state : "unfinished";
  };
  const ORDER = ["unfinished", "pruned", "cancelled", "given up", "no value"];
  function outcome(from, to) {
    const words = new Set(trials.map(apartOf)), slots = ORDER.filter((word) => words.has(word));
    const axis = scale(trials.filter((t) => apartOf(t) === null).map((t) => t.value), from, to, 40, { slots });
    return { ...axis, of: (trial) => (apartOf(trial) === null ? axis.at(trial.value) : axis.slot(apartOf(trial))) };
  }
  function reached(trial) {
    const known = trial.value === null ? "" : `${data.metric}: ${format(trial.value)}`;
    return apartOf(trial) === null || !known ? known || apartOf(trial) : `${known} so far`;
  }

  function scatter(box) {
    const [name] = data.names, height = 380, { svg, width } = canvas(box, height, `${data.metric} against ${name}`), left = 84;
    const x = scale(trials.map((t) => t.overrides[name]), left + 10, width - 30, 90, { exact: true });
    const y = outcome(height - 54, 30);
    rules(svg, y, left, width - 16);
    below(svg, x, height);
    draw(svg, "text", { class: "name", x: (left + width) / 2, y: height - 8, "text-anchor": "middle" }, cut(name, 60));
    draw(svg, "text", { class: "name", x: left - 8, y: 16 }, cut(data.metric, 60));
    const marks = draw(svg, "g", {});
    hover(box, svg, trials.map((trial, i) => {
      const place = [x.at(trial.overrides[name]), y.of(trial)];
      point(marks, i, ...place, apartOf(trial) === null);
      return { trial: i, points: [place], say: () => reached(trial) };
    }));
  }

  function parallel(box) {
    const height = 420, { svg, width } = canvas(box, height, `overrides against ${data.metric}`);
    const count = data.names.length, left = 96, right = width - 96, gap = (right - left) / count;
    const axes = data.names.map((name) => ({ name, ...scale(trials.map((t) => t.overrides[name]), height - 14, 44, 40, { exact: true }) }));
    const last = outcome(height - 14, 44);
    axes.forEach((axis) => { axis.of = (trial) => axis.at(trial.overrides[axis.name]); });
    axes.push({ name: data.metric, ...last });
    const place = axes.map((_, k) => left + k * gap);
    const marks = draw(svg, "g", {});
    hover(box, svg, trials.map((trial, i) => {
      const points = axes.map((axis, k) => [place[k], axis.of(trial)]);
      line(marks, i, points);
      return { trial: i, points, say: () => reached(trial) };
    }));
    axes.forEach((axis, k) => {
      const at = place[k], end = k === count;
      draw(svg, "line", { class: "rule", x1: at, x2: at, y1: 34, y2: height - 10, style: "stroke:var(--soft)" });
      const letters = Math.max(8, Math.floor(gap / 8));
      draw(svg, "text", { class: "name", x: at, y: 18, "text-anchor": "middle" }, cut(axis.name, letters));
      for (const tick of axis.ticks)
        draw(svg, "text", { class: tick.apart ? "apart" : "", x: end ? at + 8 : at - 8, y: tick.at + 4, "text-anchor": end ? "start" : "end" }, cut(tick.label, 14));
    });
  }

  // ---- Tables.

  function sortable(table) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    const key = (row, column) => {
      const cell = row.cells[column];
      return cell.dataset.number === undefined ? cell.textContent : Number(cell.dataset.number);
    };
    const compare = (a, b) => {
      if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
      return typeof a === "number" ? -1 : 1;
    };
    heads.forEach((head, column) => {
      head.classList.toggle("text", [...body.rows].some((row) => row.cells[column].className === "text" && row.cells[column].textContent));
      head.querySelector("button").onclick = () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => ({ row, key: key(row, column) }));
        // In both directions what is empty comes last.
        rows.sort((a, b) => (a.key === "") - (b.key === "") || sign * compare(a.key, b.key));
        body.append(...rows.map(({ row }) => row));
      };
    });
    body.onclick = (event) => {
      const row = event.target.closest("tr");
      if (row && !event.target.closest("a")) toggle(row.dataset.trials.split(" ").map(Number));
    };
    for (const row of body.rows)
      if (!row.querySelector("button")) {
        row.tabIndex = 0;
        row.onkeydown = (event) => { if (event.key === "Enter") row.click(); };
      }
  }
  document.querySelectorAll("table.sortable").forEach(sortable);

  // ---- What to draw.

  function select(parent, title, options) {
    const label = add(parent, "label", "", title), box = add(label, "select");
    for (const [value, text] of options) add(box, "option", "", text).value = value;
    return box;
  }
  const redraw = [];
  const painted = document.createElement("span");
  painted.className = "legend";
  const names = Object.keys(trials[0]?.overrides || {});
  const first = data.names.length === 1 ? data.names[0] : data.metric;
  paint(names.length || data.metric ? first : "", painted);

  const place = document.getElementById("curves");
  if (place) {
    const tools = add(place, "div", "tools"), box = add(place, "div", "plot");
    const metric = select(tools, "metric", Object.keys(data.curves).map((name) => [name, name]));
    const check = add(add(tools, "label", "", "logarithmic "), "input");
    check.type = "checkbox";
    const options = [...(data.metric ? [[data.metric, data.metric]] : []), ...names.map((name) => [name, name]), ["", "trial"]];
    const colour = select(tools, "colour", options);
    colour.value = first;
    tools.append(painted);
    const show = () => curves(box, metric.value, check.checked);
    const pick = () => {
      const values = Object.values(data.curves[metric.value]).flatMap((flat) => flat.filter((v, k) => k % 2 && v !== null));
      check.disabled = !(Math.min(...values) > 0);
      check.checked = wide(values);
      show();
      mark();
    };
    metric.onchange = pick;
    check.onchange = () => { show(); mark(); };
    colour.onchange = () => paint(colour.value, painted);
    if (trials.some((trial) => failed.has(trial.state))) add(tools, "span", "", "dashed: pruned, cancelled or given up");
    pick();
    redraw.push(show);
  }
  const against = document.getElementById("overrides");
  if (against) {
    const box = add(against, "div", "plot"), show = () => (data.names.length > 1 ? parallel(box) : scatter(box));
    show();
    redraw.push(show);
  }
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (width === window.innerWidth) return;
    width = window.innerWidth;
    for (const show of redraw) show();
    mark();
  });
  root.dataset.ready = String(document.querySelectorAll(".plot svg").length);
})();
