"use strict";
// Draws every chart of the page from the JSON element beside it: lines with bands, a cursor that follows the pointer
// or the arrow keys, and keys that hide a curve; the picture of a batch as a trie and as padded rows; and filters the
// examples. No library; text from data only ever becomes text nodes.
(() => {
  const { runs, charts, times, batches } = JSON.parse(document.getElementById("data").textContent);
  const HEIGHT = 220, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 24;

  const html = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
  const svg = (name, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
  function fill(element, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function show(value, isShare) {
    if (isShare) return (100 * value).toFixed(1) + "%";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
    return value.toLocaleString("en", { maximumSignificantDigits: Math.max(4, Math.floor(Math.log10(size)) + 1) });
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step || 0);
    return found;
  }

  // 1, 2 and 5 times the powers of ten; only the powers where the range is wide.
  function logTicks(low, high) {
    const found = [], isWide = Math.log10(high / low) > 3;
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of isWide ? [1] : [1, 2, 5]) found.push(Number(`${factor}e${power}`));
    return found.filter((y) => y >= low && y <= high);
  }

  // A noisy curve gets the mean of its neighbourhood over it. The window is centred, and narrows towards both ends, so
  // that a steep beginning is not shown later than it was.
  function smooth(points) {
    const reach = Math.ceil(points.length / 40), sums = [0];
    points.forEach(([, y], i) => sums.push(sums[i] + y));
    return points.map(([x], i) => {
      const side = Math.min(reach, i, points.length - 1 - i);
      return [x, (sums[i + side + 1] - sums[i - side]) / (2 * side + 1)];
    });
  }

  function extent(values, pad) {
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) { low -= Math.abs(low) * 0.1 || 1; high += Math.abs(high) * 0.1 || 1; }
    return [low - pad * (high - low), high + pad * (high - low)];
  }

  // Minutes of work at a step: between two lines of the log, in proportion.
  let isByTime = false;
  const redraw = [];
  function place(run, step) {
    if (!isByTime) return step;
    const known = times[run];
    if (!known.length) return 0;
    const next = known.findIndex((pair) => pair[0] >= step);
    if (next < 0) return known.at(-1)[1] / 60;
    if (next === 0 || known[next][0] === step) return known[next][1] / 60;
    const [s0, t0] = known[next - 1], [s1, t1] = known[next];
    return (t0 + (t1 - t0) * (step - s0) / (s1 - s0)) / 60;
  }

  function draw(chart) {
    const isMixed = new Set(chart.series.map((series) => series.kind)).size > 1;
    const series = chart.series.map((one) => ({
      ...one,
      color: "c" + ((runs.length === 1 && isMixed && one.kind === "eval" ? 1 : one.run) % 8) +
        (runs.length > 1 ? " d" + one.run % 4 + (isMixed && one.kind === "eval" ? " strong" : "") : ""),
      smoothed: one.kind === "train" && one.points.length > 50 ? smooth(one.points) : null,
      isHidden: false,
    }));
    const tip = html("div", { class: "tip", hidden: "" });
    const picture = svg("svg", { role: "img" });
    const caption = html("figcaption", {}, chart.title);
    const figure = html("figure", { tabindex: "0" }, caption, picture, tip);
    if (series.length > 1) series.forEach((one) => {
      const sample = svg("svg", { class: "sample " + one.color, viewBox: "0 0 26 10", "aria-hidden": "true" },
        svg("line", { class: "curve", x1: 0, x2: 26, y1: 5, y2: 5 }));
      const key = html("button", { class: "key", type: "button", "aria-pressed": "true" }, sample, one.name);
      key.addEventListener("click", () => {
        one.isHidden = !one.isHidden;
        key.setAttribute("aria-pressed", String(!one.isHidden));
        render();
      });
      caption.append(key);
    });
    // A loss that falls to a hundredth of itself shows its end only on a logarithmic scale.
    const heights = series.flatMap((one) => one.points.map((point) => point[1]));
    const canBeLog = chart.is_result && !chart.is_share && Math.min(...heights) > 0;
    let isLog = canBeLog && Math.max(...heights) / Math.min(...heights) > 20;
    if (canBeLog) {
      const scale = html("button", { class: "key scale", type: "button", "aria-pressed": String(isLog) }, "log scale");
      scale.addEventListener("click", () => {
        isLog = !isLog;
        scale.setAttribute("aria-pressed", String(isLog));
        render();
      });
      caption.append(scale);
    }
    const first = series[0].points[0], last = series[0].points.at(-1);
    picture.setAttribute("aria-label",
      `${chart.title}: from ${show(first[1], chart.is_share)} at step ${first[0]} to ${show(last[1], chart.is_share)} at step ${last[0]}`);

    let steps = [], toX, toY, width, cursor, at = null;

    function render() {
      width = Math.max(200, figure.clientWidth - 34);
      picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      const shown = series.filter((one) => !one.isHidden);
      const all = (shown.length ? shown : series);
      for (const one of series) {
        const moved = (points) => points && points.map((p) => [place(one.run, p[0]), ...p.slice(1)]);
        [one.at, one.bandAt, one.smoothedAt] = [moved(one.points), moved(one.band), moved(one.smoothed)];
      }
      steps = [...new Set(all.flatMap((one) => one.at.map((point) => point[0])))].sort((a, b) => a - b);
      const values = all.flatMap((one) => [...one.points.map((p) => p[1]), ...one.band.flatMap((p) => [p[1], p[2]])]);
      const bend = isLog ? Math.log10 : (y) => y;
      const positive = isLog ? values.filter((y) => y > 0) : values;
      const [x0, x1] = extent(steps, 0), [y0, y1] = extent(positive.map(bend), 0.06);
      toX = (x) => LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT);
      toY = (y) => HEIGHT - BOTTOM - (bend(isLog ? Math.max(y, 10 ** y0) : y) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
      picture.replaceChildren();
      for (const y of isLog ? logTicks(10 ** y0, 10 ** y1) : ticks(y0, y1, 4)) picture.append(
        svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: toY(y), y2: toY(y) }),
        svg("text", { x: LEFT - 8, y: toY(y) + 4, "text-anchor": "end" }, tickText(y)));
      for (const x of ticks(x0, x1, width / 110).filter((tick) => isByTime || Number.isInteger(tick))) picture.append(
        svg("text", { x: toX(x), y: HEIGHT - 6, "text-anchor": "middle" }, tickOf(x)));
      for (const one of shown) picture.append(curve(one));
      cursor = svg("g");
      picture.append(cursor);
      point(at);
    }

    const tickOf = (x) => Number(x.toPrecision(6)).toLocaleString("en") + (isByTime ? " min" : "");
    const tickText = (y) => chart.is_share ? Math.round(100 * y) + "%" : show(Number(y.toPrecision(6)), false);
    const path = (points) => points.map(([x, y], i) => (i ? "L" : "M") + toX(x).toFixed(1) + " " + toY(y).toFixed(1)).join("");

    function curve(one) {
      const group = svg("g", { class: one.color });
      // Where only some points have an interval, a band between those would pass by the others.
      if (one.band.length < one.points.length) for (const [x, low, high] of one.bandAt)
        group.append(svg("line", { class: "whisker", x1: toX(x), x2: toX(x), y1: toY(low), y2: toY(high) }));
      else if (one.band.length > 1) group.append(svg("path", { class: "band",
        d: path([...one.bandAt.map((p) => [p[0], p[2]]), ...one.bandAt.map((p) => [p[0], p[1]]).reverse()]) + "Z" }));
      group.append(svg("path", { d: path(one.at), class: "curve" + (one.smoothed ? " raw" : "") }));
      if (one.smoothed) group.append(svg("path", { class: "curve", d: path(one.smoothedAt) }));
      if (one.points.length <= 50) for (const [x, y] of one.at)
        group.append(svg("circle", { class: "mark", cx: toX(x), cy: toY(y), r: 3.2 }));
      return group;
    }

    function point(step) {
      at = step;
      cursor.replaceChildren();
      tip.hidden = step === null;
      if (step === null) return;
      const x = toX(step);
      cursor.append(svg("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
      tip.replaceChildren(html("b", {}, isByTime ? tickOf(step) : "step " + step.toLocaleString("en")));
      for (const one of series.filter((candidate) => !candidate.isHidden)) {
        const index = one.at.findLastIndex((p) => p[0] <= step);
        if (index < 0 || step > one.at.at(-1)[0]) continue;  // before its beginning, or after its end
        const here = one.at[index], number = one.points[index][0];
        const band = one.band.findLast((p) => p[0] === number);
        const range = band ? ` (${show(band[1], chart.is_share)} to ${show(band[2], chart.is_share)})` : "";
        const which = here[0] === step && !isByTime ? "" : `, step ${number.toLocaleString("en")}`;
        tip.append(html("div", {}, html("span", { class: "dot " + one.color }),
          (series.length > 1 ? one.name + ": " : "") + show(here[1], chart.is_share) + range + which));
        cursor.append(svg("g", { class: one.color },
          svg("circle", { class: "mark", cx: toX(here[0]), cy: toY(here[1]), r: 4.5 })));
      }
      const scale = picture.clientWidth / width, left = picture.offsetLeft + x * scale;
      tip.style.top = picture.offsetTop + 8 + "px";
      tip.style.left = Math.max(8, left + 14 + tip.offsetWidth > figure.clientWidth ? left - 14 - tip.offsetWidth : left + 14) + "px";
    }

    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect(), x = (event.clientX - box.left) * width / box.width;
      point(steps.reduce((best, step) => Math.abs(toX(step) - x) < Math.abs(toX(best) - x) ? step : best, steps[0]));
    });
    picture.addEventListener("pointerleave", () => point(null));
    figure.addEventListener("blur", () => point(null));
    figure.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move || event.target !== figure) return;
      event.preventDefault();
      const index = at === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(at);
      point(steps[Math.min(steps.length - 1, Math.max(0, index + move))]);
    });
    document.getElementById("charts").append(figure);
    new ResizeObserver(render).observe(figure);
    redraw.push(() => { at = null; render(); });
    render();
  }

  const axis = document.getElementById("axis");
  axis.hidden = !charts.length || !times.every((known) => known.length > 1);
  axis.addEventListener("click", () => {
    isByTime = !isByTime;
    axis.setAttribute("aria-pressed", String(isByTime));
    redraw.forEach((again) => again());
  });

  // A batch: examples from top to bottom, positions from left to right. As a trie, what examples share is one part that
  // spans their rows; as padded rows, each example pays for all of its own and for the longest one's length.
  function drawBatch(box) {
    const batch = batches[Number(box.dataset.run)];
    const longest = Math.max(...batch.lengths), num = batch.lengths.length;
    const row = Math.max(5, Math.min(22, Math.floor(300 / num))), height = row * num;
    const label = (part, y, h, runs, scale) => runs.map(([begin, end]) => svg("rect", { class: "label",
      x: (part[2] + begin) * scale, y, width: Math.max(0.8, (end - begin) * scale - 0.4), height: h }));

    function picture(title, described, paint) {
      const drawing = svg("svg", { class: "batch", role: "img", "aria-label": described, preserveAspectRatio: "none" });
      const tip = html("div", { class: "tip wide", hidden: "" });
      const figure = html("figure", { tabindex: "0" }, html("figcaption", {}, title), drawing, tip);
      box.append(figure);
      let parts = [], at = -1;
      const say = (index) => {
        parts[at]?.shape.classList.remove("on");
        at = index;
        tip.hidden = !parts[at];
        if (!parts[at]) return;
        parts[at].shape.classList.add("on");
        tip.replaceChildren(html("b", {}, parts[at].head), html("div", { class: "text" }, parts[at].text));
        tip.style.top = drawing.getBoundingClientRect().height + 40 + "px";
      };
      drawing.addEventListener("pointermove", (event) => say(parts.findIndex((part) => part.shape === event.target.closest("g"))));
      drawing.addEventListener("pointerleave", () => say(-1));
      figure.addEventListener("blur", () => say(-1));
      figure.addEventListener("keydown", (event) => {
        const move = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
        if (!move) return;
        event.preventDefault();
        say(Math.min(parts.length - 1, Math.max(0, at + move)));
      });
      const render = () => {
        const width = Math.max(200, figure.clientWidth - 34);
        drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
        drawing.style.height = height + "px";
        say(-1);
        parts = paint(width / longest);
        drawing.replaceChildren(...parts.map((part) => part.shape));
      };
      new ResizeObserver(render).observe(figure);
      render();
    }

    const words = (count, one) => `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;
    picture("As a trie: computed once", `The batch as a trie: ${words(batch.num_distinct, "position")}`, (scale) =>
      batch.segments.map((part) => {
        const [first, last, begin, end, text, runs] = part, y = first * row, h = (last - first) * row;
        return { head: `${words(end - begin, "token")}, shared by ${words(last - first, "example")}`, text,
          shape: svg("g", { class: "part" }, svg("rect", { class: last - first > 1 ? "shared" : "own", x: begin * scale,
            y, width: Math.max(0.8, (end - begin) * scale - 0.4), height: Math.max(1, h - 0.8) }),
            ...label(part, y, Math.max(1, h - 0.8), runs, scale)) };
      }));
    picture("As padded rows", `The same batch as padded rows: ${words(batch.num_padded, "position")}`, (scale) =>
      batch.lengths.map((length, index) => {
        const mine = batch.segments.filter(([first, last]) => first <= index && index < last), y = index * row;
        return { head: `${batch.ids[index]}: ${words(length, "token")}, ${words(longest - length, "padding token")}`,
          text: mine.map((part) => part[4]).join(""),
          shape: svg("g", { class: "part" }, svg("rect", { class: "own", x: 0, y, width: length * scale, height: row - 0.8 }),
            svg("rect", { class: "padding", x: length * scale, y, width: (longest - length) * scale, height: row - 0.8 }),
            ...mine.flatMap((part) => label(part, y, row - 0.8, part[5], scale))) };
      }));
  }

  document.querySelectorAll(".pictures").forEach(drawBatch);

  // Examples by what became of them, and by what stands in them.
  for (const section of document.querySelectorAll(".changes")) {
    const rows = [...section.querySelectorAll("tbody tr[data-outcome]")], hidden = new Set();
    const search = section.querySelector(".search"), shown = section.querySelector(".shown");
    const texts = rows.map((one) => one.textContent.toLowerCase());
    const apply = () => {
      const wanted = search.value.trim().toLowerCase();
      let count = 0;
      rows.forEach((one, index) => {
        one.hidden = hidden.has(one.dataset.outcome) || (wanted !== "" && !texts[index].includes(wanted));
        if (!one.hidden) count += 1;
      });
      shown.textContent = `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")} shown`;
    };
    for (const button of section.querySelectorAll(".filter")) button.addEventListener("click", () => {
      const outcome = button.dataset.outcome, isHidden = !hidden.delete(outcome);
      if (isHidden) hidden.add(outcome);
      button.setAttribute("aria-pressed", String(!isHidden));
      apply();
    });
    search.addEventListener("input", apply);
    apply();
  }

  charts.filter((chart) => chart.series.some((series) => series.points.length)).forEach(draw);
  if (!charts.length) document.getElementById("charts").append("No step has been logged yet.");
})();
