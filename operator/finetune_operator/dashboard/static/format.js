// Numbers, sizes and times as people read them.

/** Of shares and of numbers in short. */
const DIGITS = 3;
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** 12345678 as `11.8 MiB`. */
export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

/** A number with so many significant digits; a dash where there is none. */
export function number(value, digits = 4) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7))
    return value.toExponential(Math.max(0, digits - 2));
  return value.toLocaleString("en-GB", { maximumSignificantDigits: digits });
}

/** A whole number with separators. */
export function count(value) {
  return typeof value === "number" && Number.isFinite(value) ? Math.round(value).toLocaleString("en-GB") : "–";
}

/** Large whole numbers in short: `8.03 B` parameters. */
export function short(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  for (const [size, name] of [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    // 999,600,000 is 1 B, not 1,000 M.
    if (Number((value / size).toPrecision(DIGITS)) >= 1) return `${number(value / size, DIGITS)} ${name}`;
  }
  return String(value);
}

/** 0.0182 as `1.82 %`. */
export function share(value) {
  return Number.isFinite(value) ? `${number(value * 100, DIGITS)} %` : "–";
}

/** Seconds as `3 h 12 min`: the two largest units. */
export function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const units = [
    [Math.floor(whole / 86400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ];
  const first = units.findIndex(([value]) => value > 0);
  if (first < 0) return "0 s";
  return units
    .slice(first, first + 2)
    .filter(([value]) => value > 0)
    .map(([value, unit]) => `${value} ${unit}`)
    .join(" ");
}

let skew = 0;

/** Take the server's clock for the time: a laptop's may be wrong. */
export function serverTime(header) {
  const at = Date.parse(header ?? "");
  if (Number.isFinite(at)) skew = at - Date.now();
}

/** Seconds since a time; NaN where it is none. */
export function since(time) {
  return (Date.now() + skew - Date.parse(time ?? "")) / 1000;
}

/** How long ago, in one unit: `5 min`. */
export function age(time) {
  const seconds = since(time);
  return Number.isFinite(seconds) ? duration(seconds).split(" ").slice(0, 2).join(" ") : "–";
}

/** A time as `2026-11-22 13:05:12`, in the browser's zone. */
export function clock(time) {
  const at = new Date(time ?? "");
  if (Number.isNaN(at.getTime())) return "–";
  const two = (value) => String(value).padStart(2, "0");
  const day = [at.getFullYear(), two(at.getMonth() + 1), two(at.getDate())].join("-");
  return `${day} ${[at.getHours(), at.getMinutes(), at.getSeconds()].map(two).join(":")}`;
}

/** The end of a model's address, which is what tells it from others. */
export function modelName(uri) {
  return (uri ?? "").replace(/^[a-z0-9]+:\/{0,3}/, "") || "–";
}
