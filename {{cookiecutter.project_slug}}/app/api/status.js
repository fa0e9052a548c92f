"use strict";
// All that comes from elsewhere is shown as text, by textContent, and never becomes markup.

const POLL_MS = 2000;
const WINDOW_MS = 10500;
const PATIENCE_MS = 5000;
const UNKNOWN = "–";

function show(element, text) {
  // Only changes, so that a screen reader is not told the same again.
  if (element.textContent !== text) element.textContent = text;
}

function showState(element, state) {
  show(element, state);
  element.dataset.state = state;
}

const byName = (name) => document.getElementById(name);
const sections = [...document.querySelectorAll("[data-model]")];
const part = (section, name) => section.querySelector(`[data-of="${name}"]`);

// State

async function refreshState() {
  let answer, status;
  try {
    answer = await fetch("ready", { signal: AbortSignal.timeout(PATIENCE_MS) });
    status = await answer.json();
    if (!status.models) throw new Error("Somebody else's answer");
  } catch {
    showState(byName("state"), "no answer");
    return;
  }
  const isUnready = !answer.ok && status.status === "ready";
  showState(byName("state"), isUnready ? "not ready" : status.status);
  show(byName("fault"), status.detail ?? "");
  for (const section of sections) {
    const model = status.models[section.dataset.model];
    // Behind a load balancer it may be a replica that does not have it yet.
    if (!model) continue;
    showState(part(section, "state"), model.state);
    show(part(section, "version"), model.version ?? UNKNOWN);
    show(part(section, "provider"), model.provider ?? UNKNOWN);
  }
}

// Rates

let samples = [];

/** The lines of Prometheus' text format that are about requests, batches, the cache and models. */
function parse(text) {
  const line = /^((?:http|inference|cache|model)_\w+)\{(.*)\} (\S+)$/gm;
  const label = /(\w+)="((?:[^"\\]|\\.)*)"/g;
  return [...text.matchAll(line)].map(([, name, labels, value]) => ({
    name,
    labels: Object.fromEntries([...labels.matchAll(label)].map(([, key, of]) => [key, of])),
    value: Number(value),
  }));
}

/** The counts of one model at one time. */
function count(series, section) {
  const paths = section.dataset.paths.split(" ");
  const ofRoute = ({ handler, method }) => method === "POST" && paths.includes(handler);
  const ofModel = ({ model }) => model === section.dataset.model;
  const all = (name, belongs) => series.filter((one) => one.name === name && belongs(one.labels));
  const sum = (...which) => all(...which).reduce((total, one) => total + one.value, 0);
  const ofStatus = (digit) => (labels) => ofRoute(labels) && labels.status[0] === digit;
  const buckets = new Map();
  for (const { labels, value } of all("http_request_duration_seconds_bucket", ofRoute)) {
    const limit = labels.le === "+Inf" ? Infinity : Number(labels.le);
    buckets.set(limit, (buckets.get(limit) ?? 0) + value);
  }
  return {
    requests: sum("http_requests_total", ofRoute),
    refused: sum("http_requests_total", ofStatus("4")),
    errors: sum("http_requests_total", ofStatus("5")),
    buckets,
    waiting: sum("inference_queue_depth", ofModel),
    batches: sum("inference_batch_size_count", ofModel),
    rows: sum("inference_batch_size_sum", ofModel),
    mostRows: Math.max(0, ...all("inference_batch_max_rows", ofModel).map((one) => one.value)),
    hits: sum("cache_hits_total", ofModel),
    misses: sum("cache_misses_total", ofModel),
  };
}

function rate(value) {
  return value === 0 || value >= 100 ? Math.round(value).toLocaleString() : value.toFixed(1);
}

function duration(seconds) {
  const [value, unit] = seconds < 1 ? [seconds * 1000, "ms"] : [seconds, "s"];
  return `${Number(value.toFixed(value < 10 ? 1 : 0))} ${unit}`;
}

/** As Prometheus does: evenly spread within the bucket that the quantile lies in. */
function quantile(share, now, before) {
  const limits = [...now.keys()].sort((a, b) => a - b);
  const upTo = (limit) => now.get(limit) - (before.get(limit) ?? 0);
  const rank = share * (limits.length && upTo(Infinity));
  if (!rank) return UNKNOWN;
  let low = 0;
  for (const limit of limits) {
    if (upTo(limit) < rank) {
      low = limit;
      continue;
    }
    if (!low) return `< ${duration(limit)}`;
    if (limit === Infinity) return `> ${duration(low)}`;
    return duration(low + ((limit - low) * (rank - upTo(low))) / (upTo(limit) - upTo(low)));
  }
  return UNKNOWN;
}

function showRates(section, now, before, seconds) {
  const grown = (name) => Math.max(0, now[name] - before[name]);
  for (const name of ["requests", "refused", "errors"]) {
    show(part(section, name), rate(grown(name) / seconds));
  }
  show(part(section, "median"), quantile(0.5, now.buckets, before.buckets));
  show(part(section, "slowest"), quantile(0.99, now.buckets, before.buckets));
  show(part(section, "waiting"), now.waiting.toLocaleString());
  const mean = grown("rows") / grown("batches");
  showShare(part(section, "rows"), mean / now.mostRows, `${rate(mean)} of ${now.mostRows}`);
  const hits = grown("hits") / (grown("hits") + grown("misses"));
  showShare(part(section, "hits"), hits, `${Math.round(hits * 100)}%`);
}

function showShare(element, share, text) {
  const isKnown = Number.isFinite(share);
  show(element, isKnown ? text : UNKNOWN);
  element.parentElement.querySelector("meter").value = isKnown ? share : 0;
}

async function refreshRates() {
  let text;
  try {
    const answer = await fetch("metrics", { signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(answer.status);
    text = await answer.text();
  } catch {
    show(byName("live"), "No rates: /metrics does not answer here");
    return;
  }
  const series = parse(text);
  // Behind a load balancer the next answer may be another replica's. What tells them apart is when
  // they loaded their models.
  const loaded = series.filter((one) => one.name === "model_loaded_timestamp_seconds");
  const sample = {
    time: performance.now(),
    origin: loaded.map((one) => one.value).join(),
    counts: sections.map((section) => count(series, section)),
  };
  samples = [...samples.filter((old) => sample.time - old.time < WINDOW_MS), sample];
  const first = samples.find((old) => old.origin === sample.origin);
  if (first === sample) return;
  const seconds = (sample.time - first.time) / 1000;
  sections.forEach((section, at) => showRates(section, sample.counts[at], first.counts[at], seconds));
  show(byName("live"), "Rates of the last ten seconds, of all workers");
}

let timer;

async function poll() {
  clearTimeout(timer);
  await Promise.allSettled([refreshState(), refreshRates()]);
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(poll, POLL_MS);
}

document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();

// The form

/** The JSON that a control stands for; undefined: the feature is left out. */
function jsonOf(control) {
  const { kind, empty } = control.dataset;
  if (kind === "flag") return String(control.checked);
  if (kind === "choice") return control.value;
  if (control.validity.badInput) throw new Error("Not a number");
  if (!control.value.trim() && (kind === "number" || kind === "json")) return empty;
  if (!control.value) return empty;
  if (kind === "json") {
    try {
      JSON.parse(control.value);
    } catch {
      throw new Error("Not JSON");
    }
    return control.value;
  }
  if (kind !== "number") return JSON.stringify(control.value);
  // As it was written, so that no digit is lost, unless HTML allows what JSON does not: .5, 007.
  const isJson = /^-?(0|[1-9]\d*)(\.\d+)?(e[+-]?\d+)?$/i.test(control.value);
  return isJson ? control.value : String(Number(control.value));
}

function complain(control, message) {
  control.setAttribute("aria-invalid", "true");
  show(byName(`${control.id}-error`), message);
}

function forgetComplaints(form) {
  for (const control of form.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    show(byName(`${control.id}-error`), "");
  }
}

/** Each message at its field; those of no field stay in the answer alone. */
function showErrors(controls, errors) {
  for (const { field, message } of errors) {
    const control = controls.find(({ dataset }) => `${field}.`.startsWith(`features.${dataset.field}.`));
    if (!control) continue;
    const where = field.slice(`features.${control.dataset.field}.`.length);
    complain(control, where ? `${where}: ${message}` : message);
  }
}

function showAnswer(form, summary, text) {
  const box = form.querySelector(".answer");
  box.hidden = false;
  show(box.querySelector("p"), summary);
  try {
    text = JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    // Something between here and the service answers, and not in JSON.
  }
  show(box.querySelector("pre"), text);
}

async function ask(form, controls, body) {
  const headers = { "Content-Type": "application/json" };
  const key = form.querySelector("[data-key]")?.value;
  if (key) headers["X-API-Key"] = key;
  const started = performance.now();
  const answer = await fetch(form.dataset.path, { method: "POST", headers, body });
  const text = await answer.text();
  const facts = [`${answer.status} ${answer.statusText}`, duration((performance.now() - started) / 1000)];
  const cache = answer.headers.get("X-Cache");
  if (cache) facts.push(`cache ${cache}`);
  showAnswer(form, facts.join(" · "), text);
  if (answer.status === 422) showErrors(controls, JSON.parse(text).errors ?? []);
}

async function submit(form) {
  forgetComplaints(form);
  const controls = [...form.querySelectorAll("[data-field]")];
  const features = [];
  for (const control of controls) {
    try {
      const json = jsonOf(control);
      if (json !== undefined) features.push(`${JSON.stringify(control.dataset.field)}: ${json}`);
    } catch (error) {
      complain(control, error.message);
    }
  }
  if (!form.querySelector("[aria-invalid]")) {
    const button = form.querySelector("button");
    button.disabled = true;
    try {
      await ask(form, controls, `{"features": {${features.join(", ")}}}`);
    } catch (error) {
      showAnswer(form, "No answer", String(error.message));
    }
    button.disabled = false;
  }
  form.querySelector("[aria-invalid]")?.focus();
}

for (const form of document.forms) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit(form);
  });
  form.addEventListener("reset", () => {
    forgetComplaints(form);
    form.querySelector(".answer").hidden = true;
  });
}
