"use strict";
// The page of `s1fast serve`. What the model writes reaches the document as text nodes alone.

const $ = (id) => document.getElementById(id);
const LEAST = 16; // the slider's first step above 0
let most = 4096; // the model's context, once known
let running = null; // the AbortController of what runs

// -- the budget: a slider by ratio, a number for exactness ---------------------------------------

function fromSlider(place) {
  return place === 0 ? 0 : Math.round(LEAST * (most / LEAST) ** ((place - 1) / 99));
}

function toSlider(tokens) {
  if (tokens < LEAST) return tokens ? 1 : 0;
  return Math.round(1 + (99 * Math.log(tokens / LEAST)) / Math.log(most / LEAST));
}

$("budget").addEventListener("input", () => {
  $("budget-number").value = fromSlider(Number($("budget").value));
});
$("budget-number").addEventListener("input", () => {
  $("budget").value = toSlider(Number($("budget-number").value));
});

// -- asking --------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value;
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  if (response.status === 401) $("key-row").hidden = false;
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with HTTP ${response.status}`;
  }
}

/** The chunks of a streamed answer. */
async function* chunks(body, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw new Error(await failure(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection to the server was lost before the answer's end");
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function asked() {
  const budget = Number($("budget-number").value);
  const waits = Number($("waits").value);
  const final = Number($("answer-tokens").value);
  const fields = {
    messages: [{ role: "user", content: $("prompt").value }],
    temperature: Number($("temperature").value),
    max_tokens: budget + final,
    thinking_token_budget: budget,
  };
  if (waits) Object.assign(fields, { num_ignore: waits, ignore_text: $("ignore").value });
  return fields;
}

// -- what is shown -------------------------------------------------------------------------------

const view = {
  start(budget, waits) {
    Object.assign(this, { budget, allowed: waits, thinking: 0, waits: 0, answer: 0, tokens: 0 });
    Object.assign(this, { began: performance.now(), first: 0, kind: "", node: null });
    for (const id of ["thinking", "answer"]) $(id).replaceChildren();
    for (const id of ["answer", "answer-title", "error", "figure"]) $(id).hidden = true;
    $("output").hidden = false;
    this.counts();
  },

  /** A piece of text where it belongs; an intervention is marked where it happened. */
  piece(choice) {
    const { s1, delta } = choice;
    this.first ||= performance.now();
    this.tokens += s1.tokens;
    const near = nearBottom($("thinking"));
    if (s1.kind === "thinking" || s1.kind === "ignore") this.thinking += s1.tokens;
    if (s1.kind === "ignore") {
      this.waits += 1;
      this.mark($("thinking"), "ignore", delta.reasoning);
      if (this.waits === 1) this.note("end of thinking ignored");
    } else if (s1.kind === "end") {
      this.end(delta.content);
    } else if (s1.kind === "thinking") {
      this.write($("thinking"), s1.kind, delta.reasoning);
    } else {
      this.answer += s1.tokens;
      this.reveal();
      this.write($("answer"), s1.kind, delta.content);
    }
    if (near) $("thinking").scrollTop = $("thinking").scrollHeight;
    this.counts();
  },

  write(place, kind, text) {
    if (kind !== this.kind) place.append((this.node = document.createTextNode("")));
    this.kind = kind;
    this.node.appendData(text);
  },

  mark(place, kind, text) {
    const mark = document.createElement("mark");
    mark.className = kind;
    mark.textContent = text;
    place.append(mark);
    this.kind = kind;
  },

  note(text, ...more) {
    const said = document.createElement("span");
    said.className = ["note", ...more].join(" ");
    said.textContent = text;
    $("thinking").append(said);
  },

  end(forced) {
    const cut = forced.trim() !== "";
    const how = cut ? "thinking was cut" : "the model ended its thinking";
    this.note(`${how} after ${this.thinking} tokens`, "rule");
    this.reveal();
    if (cut) this.mark($("answer"), "end", forced.trim());
    this.kind = "end";
  },

  reveal() {
    $("answer").hidden = $("answer-title").hidden = false;
  },

  counts() {
    const spent = this.first ? (performance.now() - this.first) / 1000 : 0;
    $("n-thinking").textContent = `${this.thinking} of ${this.budget}`;
    $("n-waits").textContent = `${this.waits} of ${this.allowed}`;
    $("n-answer").textContent = this.answer;
    $("n-first").textContent = this.first ? `${Math.round(this.first - this.began)} ms` : "–";
    $("n-rate").textContent = spent > 0.2 ? ((this.tokens - 1) / spent).toFixed(1) : "–";
    const share = this.budget ? this.thinking / this.budget : 1;
    $("meter").firstElementChild.style.width = `${Math.min(100, 100 * share)}%`;
  },
};

function nearBottom(box) {
  return box.scrollHeight - box.scrollTop - box.clientHeight < 40;
}

async function showCache() {
  const response = await fetch("/metrics").catch(() => null);
  if (!response?.ok) return;
  const found = /^s1fast:kv_cache_usage_perc\S* (\S+)$/m.exec(await response.text());
  if (found) $("n-cache").textContent = `${(100 * Number(found[1])).toFixed(1)} %`;
}

// -- running and stopping ------------------------------------------------------------------------

async function run(work) {
  if (running || !$("ask").reportValidity()) return;
  running = new AbortController();
  $("run").disabled = $("tree").disabled = true;
  $("stop").disabled = false;
  const watching = setInterval(showCache, 700);
  let last = "";
  try {
    $("status").textContent = "thinking …";
    last = await work(running.signal);
  } catch (error) {
    if (error.name === "AbortError") {
      last = "stopped; its pages are free";
    } else {
      const lost = error instanceof TypeError;
      $("error").textContent = lost ? "The server cannot be reached." : `Not done: ${error.message}`;
      $("error").hidden = false;
      $("output").hidden = !view.tokens;
    }
  } finally {
    running.abort();
    running = null;
    clearInterval(watching);
    $("run").disabled = $("tree").disabled = false;
    $("stop").disabled = true;
    $("status").textContent = last;
    for (const soon of [150, 1000, 5000]) setTimeout(showCache, soon);
  }
}

async function think(signal) {
  const fields = asked();
  view.start(fields.thinking_token_budget, fields.num_ignore ?? 0);
  let reason = "";
  for await (const chunk of chunks(fields, signal)) {
    const [choice] = chunk.choices;
    if (choice?.s1?.kind) {
      view.piece(choice);
      $("status").textContent = choice.s1.kind === "answer" ? "answering …" : "thinking …";
    }
    reason = choice?.finish_reason ?? reason;
  }
  return reason === "length" ? "done: out of tokens" : "done";
}

// -- the curve -----------------------------------------------------------------------------------

/** What a text answers: its last \boxed{}, else what follows the last "Answer:", else all of it. */
function answerOf(text) {
  const boxed = [...text.matchAll(/\\boxed\{([^{}]*)\}/g)].pop();
  const said = boxed ? boxed[1] : text.split("Answer:").pop();
  return said.trim().replace(/\s+/g, " ").replace(/\.$/, "");
}

function commonest(texts) {
  const counts = new Map();
  for (const text of texts) counts.set(text, (counts.get(text) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? "";
}

async function drawCurve(signal) {
  const fields = asked();
  const top = Math.max(1, fields.thinking_token_budget);
  delete fields.thinking_token_budget;
  const steps = Array.from({ length: 7 }, (_, i) => Math.max(1, Math.round(top / 2 ** (6 - i))));
  const budgets = [...new Set(steps)];
  const count = Number($("samples").value);
  let samples = 0;
  const answers = budgets.map(() => []); // by budget: of each sample that is done there
  view.start(top, fields.num_ignore ?? 0);
  $("curve-words").textContent = `Decoding ${counted(count)} …`;
  plot(budgets, answers, 0);
  const one = async (sample) => {
    const texts = budgets.map(() => "");
    for await (const chunk of chunks({ ...fields, budgets, seed: sample }, signal)) {
      for (const choice of chunk.choices) {
        const { index, delta, finish_reason: ended, s1 } = choice;
        texts[index] += delta.content ?? "";
        if (ended) {
          answers[index].push(answerOf(texts[index]));
          plot(budgets, answers, 0);
        } else if (sample === 0 && index === budgets.length - 1 && s1?.kind) {
          view.piece(choice);
          if (s1.kind !== "answer") plot(budgets, answers, view.thinking);
        }
      }
    }
    samples += 1;
    $("status").textContent = `${samples} of ${counted(count)}`;
  };
  const all = Array.from({ length: count }, (_, sample) => one(sample));
  await Promise.all(all);
  return `done: ${count * budgets.length} answers from ${count} decode${count > 1 ? "s" : ""}`;
}

function counted(count) {
  return count === 1 ? "1 sample" : `${count} samples`;
}

function plot(budgets, answers, now) {
  const [left, right, upper, lower] = [44, 664, 12, 176];
  const [low, high] = [Math.log(budgets[0]), Math.log(budgets.at(-1))];
  const x = (tokens) =>
    high === low ? right : left + ((right - left) * (Math.log(Math.max(tokens, 1)) - low)) / (high - low);
  const y = (share) => lower - (lower - upper) * share;
  const expected = $("expected").value.trim();
  const begun = answers.map((each, i) => ({ b: budgets[i], each })).filter(({ each }) => each.length);
  const wanted = expected || commonest(begun.at(-1)?.each ?? []);
  const points = begun.map(({ b, each }) => {
    const share = each.filter((text) => text === wanted).length / each.length;
    return { b, share, told: `${Math.round(100 * share)} %`, answer: commonest(each) };
  });
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    parts.push(shape("line", { class: "axis", x1: left, x2: right, y1: y(share), y2: y(share) }));
    parts.push(label(left - 8, y(share) + 4, `${100 * share} %`, "end"));
  }
  for (const b of budgets) parts.push(label(x(b), lower + 18, b, "middle"));
  parts.push(label(right, lower + 36, "most thinking tokens", "end"));
  if (now) {
    const at = Math.max(left, Math.min(right, x(now)));
    parts.push(shape("line", { class: "now", x1: at, x2: at, y1: upper, y2: lower }));
  }
  if (points.length) {
    const line = points.map(({ b, share }) => `${x(b)},${y(share)}`).join(" ");
    parts.push(shape("polyline", { class: "line", points: line }));
    for (const { b, share } of points) {
      parts.push(shape("circle", { class: "dot", cx: x(b), cy: y(share), r: 4 }));
    }
    const rule = expected ? "is right" : "agrees with the commonest answer at the largest budget";
    const come = Math.max(...answers.map((each) => each.length));
    $("curve-words").textContent = `Of ${counted(come)}, the share that ${rule}.`;
    const told = points.map(({ b, told }) => `${b}: ${told}`).join(", ");
    $("curve").setAttribute("aria-label", `Share of samples by budget. ${told}`);
    const rows = points.map(({ b, told, answer }) => {
      const row = document.createElement("tr");
      for (const text of [b, told, answer]) row.insertCell().textContent = String(text).slice(0, 80);
      return row;
    });
    $("cells").tBodies[0].replaceChildren(...rows);
  }
  $("cells").hidden = !points.length;
  $("figure").hidden = false;
  $("curve").replaceChildren(...parts);
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function label(x, y, text, anchor) {
  const made = shape("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

// -- events --------------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run(think);
});
$("tree").addEventListener("click", () => run(drawCurve));
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(think);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("key").addEventListener("change", connect);

async function connect() {
  const response = await fetch("/v1/models", { headers: headers() }).catch(() => null);
  if (!response?.ok) {
    $("model").textContent = response ? await failure(response) : "the server cannot be reached";
    return;
  }
  const [card] = (await response.json()).data;
  most = card.max_model_len;
  $("budget-number").max = most;
  $("budget-number").value = Math.min(512, Math.floor(most / 4));
  $("budget").value = toSlider(Number($("budget-number").value));
  $("model").textContent = `${card.id}, a context of ${most.toLocaleString("en")} tokens`;
  showCache();
}
connect();
