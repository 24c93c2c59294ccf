// A line chart in SVG: axes, a cross-hair for pointer and keyboard, a logarithmic scale, smoothing.

import { h, put, s } from "./dom.js";
import { count, number } from "./format.js";

const HEIGHT = 168;
const EDGE = { top: 8, right: 10, bottom: 22, left: 52 };
const SMOOTHING = 0.85;

/**
 * A chart of one or two curves over optimizer steps.
 * options: title, names (a word for each curve), format (a value as text), log (whether that scale makes sense).
 */
export function chart({ title, names, format = (value) => number(value), log = true }) {
  let curves = [];
  let scales = null;
  let at = -1;
  const modes = { log: false, smooth: false };

  const readout = h("output", { class: "readout" });
  const svg = s("svg", { class: "plot", height: HEIGHT, tabindex: "0", role: "img" });
  const toggle = (mode, text) =>
    h(
      "button",
      {
        type: "button",
        class: "quiet small",
        "aria-pressed": "false",
        "aria-label": `${title}: ${text}`,
        onclick: (event) => {
          modes[mode] = !modes[mode];
          event.target.setAttribute("aria-pressed", String(modes[mode]));
          draw();
        },
      },
      text,
    );
  const element = h(
    "figure",
    { class: "chart" },
    h("figcaption", {}, h("h3", {}, title), readout, log ? toggle("log", "log") : "", toggle("smooth", "smooth")),
    svg,
  );

  function draw() {
    const width = svg.clientWidth || 480;
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const drawn = curves.map((curve) => (modes.smooth ? smoothed(curve) : curve));
    const points = drawn.flat();
    scales = points.length ? scalesOf(points, width, modes.log) : null;
    svg.replaceChildren();
    if (!scales) {
      svg.append(
        s("text", { class: "none", x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing reported yet"),
      );
      svg.setAttribute("aria-label", `${title}: nothing reported yet`);
      put(readout, "");
      return;
    }
    axes(svg, scales, width, format);
    curves.forEach((curve, index) => {
      if (modes.smooth) svg.append(s("path", { class: "raw", "data-curve": index, d: line(curve, scales) }));
      svg.append(s("path", { class: "line", "data-curve": index, d: line(drawn[index], scales) }));
      if (drawn[index].length === 1)
        svg.append(
          s("circle", {
            class: "dot",
            "data-curve": index,
            cx: scales.x(drawn[index][0][0]),
            cy: scales.y(drawn[index][0][1]),
            r: 3,
          }),
        );
      for (const step of restarts(curve))
        svg.append(
          s(
            "path",
            { class: "restart", d: `M${scales.x(step)} ${EDGE.top}V${HEIGHT - EDGE.bottom}` },
            s("title", {}, `another attempt went on after step ${count(step)}`),
          ),
        );
    });
    cross = s("g", { class: "cross" });
    svg.append(cross);
    svg.setAttribute(
      "aria-label",
      `${title}: ${curves
        .map((curve, index) => described(names[index], curve, format))
        .filter(Boolean)
        .join("; ")}. Arrow keys read values.`,
    );
    point();
  }

  let cross = s("g");

  function point() {
    cross.replaceChildren();
    const main = curves[0]?.length ? curves[0] : (curves.find((curve) => curve.length) ?? []);
    const [step] = main[at] ?? main.at(-1) ?? [];
    if (step === undefined || !scales) return put(readout, "");
    const texts = curves.map((curve, index) => {
      const near = at < 0 ? curve.at(-1) : nearest(curve, step);
      if (!near) return "";
      if (at >= 0)
        cross.append(
          s("circle", { class: "dot", "data-curve": index, cx: scales.x(near[0]), cy: scales.y(near[1]), r: 3 }),
        );
      return names.length > 1 ? `${names[index]} ${format(near[1])}` : format(near[1]);
    });
    if (at >= 0) cross.prepend(s("path", { d: `M${scales.x(step)} ${EDGE.top}V${HEIGHT - EDGE.bottom}` }));
    put(readout, `${texts.filter(Boolean).join("  ")}${at >= 0 ? `  at step ${count(step)}` : ""}`);
  }

  svg.addEventListener("pointermove", (event) => {
    if (!scales || !curves[0]?.length) return;
    const box = svg.getBoundingClientRect();
    const step = scales.stepAt(event.clientX - box.left);
    at = curves[0].indexOf(nearest(curves[0], step));
    point();
  });
  const leave = () => {
    at = -1;
    point();
  };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const last = (curves[0]?.length ?? 0) - 1;
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    at = Math.max(0, Math.min(last, (at < 0 ? last : at) + moves[event.key]));
    point();
  });
  new ResizeObserver(draw).observe(svg);

  return {
    element,
    /** curves: for each name a list of [step, value]. */
    update(now) {
      curves = now;
      draw();
    },
  };
}

function described(name, curve, format) {
  if (!curve.length) return "";
  const said = ([step, value]) => `${format(value)} at step ${count(step)}`;
  return `${name} from ${said(curve[0])} to ${said(curve.at(-1))}`;
}

function scalesOf(points, width, wantsLog) {
  const steps = points.map(([step]) => step);
  const values = points.map(([, value]) => value);
  const log = wantsLog && Math.min(...values) > 0;
  const [left, right] = [Math.min(...steps), Math.max(...steps)];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (log) [low, high] = [Math.log10(low), Math.log10(high)];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  // A quantity that cannot be negative does not begin below zero.
  low = !log && low >= 0 ? Math.max(0, low - room) : low - room;
  high += room;
  const across = width - EDGE.left - EDGE.right;
  const down = HEIGHT - EDGE.top - EDGE.bottom;
  const span = right - left || 1;
  return {
    left,
    right,
    low,
    high,
    log,
    x: (step) => round(EDGE.left + ((step - left) / span) * across),
    y: (value) => round(EDGE.top + (1 - ((log ? Math.log10(value) : value) - low) / (high - low)) * down),
    stepAt: (pixel) => left + ((pixel - EDGE.left) / across) * span,
  };
}

function axes(svg, scales, width, format) {
  const values = scales.log ? logTicks(scales.low, scales.high) : ticks(scales.low, scales.high, 4);
  for (const value of values) {
    const y = scales.y(value);
    svg.append(
      s("path", { class: "grid", d: `M${EDGE.left} ${y}H${width - EDGE.right}` }),
      s("text", { x: EDGE.left - 6, y: y + 3.5, "text-anchor": "end" }, format(value)),
    );
  }
  for (const step of ticks(scales.left, scales.right, Math.max(2, Math.floor(width / 110))).filter(Number.isInteger)) {
    const x = scales.x(step);
    svg.append(s("text", { x, y: HEIGHT - 6, "text-anchor": x > width - 30 ? "end" : "middle" }, count(step)));
  }
}

/** Round numbers between two bounds: 1, 2 or 5 times a power of ten apart. */
export function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5].map((factor) => factor * power).find((one) => one >= rough) ?? 10 * power;
  const first = Math.ceil(low / step - 1e-9);
  // Counted from 0: adding 1 to a number beyond 2^53 gives the same number.
  const many = Math.min(Math.floor(high / step + 1e-9) - first + 1, 2 * wanted + 2);
  return Array.from({ length: Math.max(0, many) }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power += 1) {
    for (const factor of high - low > 2 ? [1] : [1, 2, 5]) {
      const value = Number((factor * 10 ** power).toPrecision(3));
      if (Math.log10(value) >= low && Math.log10(value) <= high) found.push(value);
    }
  }
  return found.length > 1 ? found : ticks(10 ** low, 10 ** high, 3).filter((value) => value > 0);
}

function line(curve, scales) {
  let before = -Infinity;
  return curve
    .map(([step, value]) => {
      const move = step < before || before === -Infinity ? "M" : "L";
      before = step;
      return `${move}${scales.x(step)} ${scales.y(scales.log ? Math.max(value, 1e-30) : value)}`;
    })
    .join("");
}

/** Steps at which another attempt went on: the curve steps back there. */
function restarts(curve) {
  return curve.filter(([step], index) => index > 0 && step < curve[index - 1][0]).map(([step]) => step);
}

/** An exponential average without the bias of its beginning. */
function smoothed(curve) {
  let [sum, weight, before] = [0, 0, -Infinity];
  return curve.map(([step, value]) => {
    if (step < before) [sum, weight] = [0, 0];
    before = step;
    sum = SMOOTHING * sum + (1 - SMOOTHING) * value;
    weight = SMOOTHING * weight + (1 - SMOOTHING);
    return [step, sum / weight];
  });
}

function nearest(curve, step) {
  let best = curve[0];
  for (const one of curve) if (Math.abs(one[0] - step) <= Math.abs(best[0] - step)) best = one;
  return best;
}

function round(value) {
  return Math.round(value * 10) / 10;
}
