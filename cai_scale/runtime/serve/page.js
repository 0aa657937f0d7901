"use strict";

// What the server and the model say enters the page as text, never as markup.

const LABELS = {
  en: {
    prompt: "Prompt", promptHint: "What is asked", ask: "Ask the model", stop: "Stop",
    answer: "The model’s answer", take: "Score this answer", response: "Response",
    responseHint: "Type or paste an answer: it is scored as you type", overall: "Overall", reward: "Reward model:",
    words: "Words that moved the scores", none: "None: every principle is where it starts.",
    token: "Access token", enter: "Enter", tokens: "tokens", seed: "seed", lost: "No connection to the server.",
  },
  vi: {
    prompt: "Câu hỏi", promptHint: "Điều muốn hỏi", ask: "Hỏi mô hình", stop: "Dừng",
    answer: "Câu trả lời của mô hình", take: "Chấm câu trả lời này", response: "Câu trả lời",
    responseHint: "Gõ hoặc dán một câu trả lời: điểm được tính ngay khi gõ", overall: "Điểm chung", reward: "Mô hình thưởng:",
    words: "Những từ làm thay đổi điểm", none: "Không có: mọi nguyên tắc giữ điểm ban đầu.",
    token: "Mã truy cập", enter: "Vào", tokens: "token", seed: "seed", lost: "Không kết nối được với máy chủ.",
  },
};
const NAMES = { en: "English", vi: "Tiếng Việt" };
const PAUSE = 250; // milliseconds without a key before the response is scored

const $ = (id) => document.getElementById(id);
const state = { language: "en", token: "", constitution: null, verdict: null, text: "", asking: null };
const say = (key) => (LABELS[state.language] ?? LABELS.en)[key];
const signed = (effect) => (effect < 0 ? "−" : "+") + Math.abs(effect).toFixed(2);

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function complain(message) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
}

async function request(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  let response;
  try {
    response = await fetch(path, {
      headers, signal, method: body ? "POST" : "GET", body: body && JSON.stringify(body),
    });
  } catch (error) {
    if (error.name !== "AbortError") complain(say("lost"));
    throw error;
  }
  $("access").hidden = response.status !== 401;
  if (!response.ok) {
    const { error } = await response.json();
    if (response.status !== 401) complain(error.message);
    throw new Error(error.message);
  }
  complain("");
  return response;
}

// Scores

let scoring = 0;
async function score() {
  const turn = ++scoring;
  const text = $("response").value;
  let verdict = null;
  if (text.trim()) {
    const body = { prompt: $("prompt").value, response: text };
    verdict = await (await request("v1/score", body)).json();
  }
  if (turn === scoring) {
    Object.assign(state, { verdict, text });
    showVerdict();
  }
}

function showVerdict() {
  const { verdict, constitution, text } = state;
  $("scored").hidden = !constitution;
  if (!constitution) return;
  const scores = verdict?.principles; // a response without text has none
  $("overall").textContent = scores ? verdict.overall.toFixed(2) : "–";
  const reward = verdict?.reward?.overall; // what the trained model says, where there is one
  $("reward").textContent = reward === undefined ? "" : `${say("reward")} ${reward.toFixed(2)}`;
  if (!$("principles").children.length) {
    $("principles").replaceChildren(...constitution.principles.map(emptyBar));
  }
  constitution.principles.forEach((principle, index) =>
    fillBar($("principles").children[index], principle, scores?.[principle.id]));
  $("moved").hidden = !scores;
  $("words").replaceChildren(...(scores ? highlighted(text, verdict.words) : []));
}

const translated = (texts) => texts[state.language] ?? Object.values(texts)[0];

function emptyBar() {
  const meter = element("div", { className: "bar", role: "meter" }, element("div"));
  return element("li", {},
    element("div", { className: "name" }, element("span"), element("span")),
    Object.assign(meter, { ariaValueMin: "0", ariaValueMax: "1" }),
    element("p", { className: "statement" }));
}

// In place, so that the bar glides to its new length.
function fillBar(item, principle, value) {
  const [name, meter, statement] = item.children;
  const title = translated(principle.title);
  name.firstChild.textContent = meter.ariaLabel = title;
  name.lastChild.textContent = value?.toFixed(2) ?? "–";
  meter.ariaValueNow = String(value ?? 0);
  meter.firstChild.style.width = `${100 * (value ?? 0)}%`;
  statement.textContent = translated(principle.statement);
}

function highlighted(text, words) {
  if (!words.length) return [element("span", { className: "quiet", textContent: say("none") })];
  const letters = Array.from(text); // offsets count characters, not UTF-16 units
  const titles = new Map(state.constitution.principles.map((p) => [p.id, translated(p.title)]));
  const parts = [];
  let end = 0;
  for (const word of words) {
    parts.push(letters.slice(end, word.start).join(""));
    const mark = element("mark", {
      className: word.effect < 0 ? "down" : "up",
      title: `${titles.get(word.principle)} ${signed(word.effect)}`,
      textContent: letters.slice(word.start, word.end).join(""),
    });
    mark.dataset.effect = signed(word.effect);
    parts.push(mark);
    end = word.end;
  }
  return [...parts, letters.slice(end).join("")];
}

// The model's answer

async function* events(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.slice("data: ".length);
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask() {
  const content = $("prompt").value;
  if (!content.trim() || state.asking) return;
  state.asking = new AbortController();
  const writing = (on) => {
    $("answered").classList.toggle("writing", on);
    $("ask").disabled = on;
    $("stop").hidden = !on;
    $("take").hidden = on || !$("answer").textContent;
  };
  $("answer").textContent = $("counted").textContent = "";
  $("answered").hidden = false;
  writing(true);
  try {
    const body = {
      messages: [{ role: "user", content }], stream: true, stream_options: { include_usage: true },
    };
    const response = await request("v1/chat/completions", body, state.asking.signal);
    for await (const event of events(response.body)) {
      if (event.error) complain(event.error.message);
      for (const choice of event.choices ?? []) $("answer").append(choice.delta.content ?? "");
      if (event.usage) {
        $("counted").textContent = `${event.usage.completion_tokens} ${say("tokens")} · ${say("seed")} ${event.seed}`;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) complain(say("lost"));
  } finally {
    state.asking = null;
    writing(false);
    $("answered").hidden = !$("answer").textContent;
  }
}

// Languages and the first look

function speak(language) {
  state.language = language;
  document.documentElement.lang = language;
  for (const item of document.querySelectorAll("[data-label]")) item.textContent = say(item.dataset.label);
  for (const item of document.querySelectorAll("[data-hint]")) item.placeholder = say(item.dataset.hint);
  for (const button of $("languages").children) button.ariaPressed = String(button.value === language);
  showVerdict();
}

async function open() {
  const [constitution, models] = await Promise.all(
    ["v1/constitution", "v1/models"].map(async (path) => (await request(path)).json()));
  state.constitution = constitution;
  $("served").textContent = `${models.data[0].id} · ${constitution.name}`;
  $("languages").replaceChildren(...constitution.languages.map((language) => element("button", {
    type: "button", value: language, textContent: NAMES[language] ?? language, onclick: () => speak(language),
  })));
  const wished = navigator.languages.map((tag) => tag.split("-")[0]);
  speak(wished.find((tag) => constitution.languages.includes(tag)) ?? constitution.languages[0]);
}

const ignore = () => {}; // `request` has told the reader already
let timer;
for (const id of ["prompt", "response"]) {
  $(id).addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => score().catch(ignore), PAUSE);
  });
}
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});
$("ask").addEventListener("click", ask);
$("stop").addEventListener("click", () => state.asking?.abort());
$("take").addEventListener("click", () => {
  $("response").value = $("answer").textContent;
  score().catch(ignore);
  $("response").scrollIntoView({ behavior: "smooth", block: "start" });
});
$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token").value;
  open().catch(ignore);
});
speak("en");
open().catch(ignore);
