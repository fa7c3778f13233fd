// The chat: sends messages to the proxy with `fetch`, and shows the events of the answer as they arrive.

const { proxy, token, origin } = await (await fetch("config.json")).json();

const byId = (id) => document.getElementById(id);
const [conversation, form, message, send, stop] = ["conversation", "form", "message", "send", "stop"].map(byId);
byId("page").textContent = location.host;
byId("proxy").textContent = new URL(proxy).host;

/** What was said so far, as the API expects it. */
const messages = [];
let running;

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  if (text) {
    message.value = "";
    chat(text, token);
  }
});
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
for (const idea of document.querySelectorAll("[data-say]")) {
  idea.addEventListener("click", () => chat(idea.dataset.say, idea.dataset.token ?? token));
}
stop.addEventListener("click", () => running?.abort());

/** Sends what the user said, and shows the answer or why there is none. */
async function chat(said, token) {
  if (running) return;
  running = new AbortController();
  setBusy(true);
  messages.push({ role: "user", content: said });
  show("said", said);
  const answer = show("answer", "");
  answer.setAttribute("aria-busy", "true");
  try {
    const response = await fetch(`${proxy}/v1/chat/completions`, {
      method: "POST",
      headers: { authorization: `Bearer ${token}`, "content-type": "application/json" },
      body: JSON.stringify({ model: "selam-turbo", messages, stream: true }),
      signal: running.signal,
    });
    if (!response.ok) throw new ApiError(response, await response.json());
    for await (const { choices } of events(response)) {
      answer.textContent += choices[0]?.delta.content ?? "";
      scroll();
    }
    messages.push({ role: "assistant", content: answer.textContent });
    // Readable because the proxy exposes them.
    const left = Number(response.headers.get("x-ratelimit-remaining")).toLocaleString("en");
    note(`${response.headers.get("x-request-id")} · ${left} requests left`);
  } catch (error) {
    messages.pop();
    if (!answer.textContent) answer.remove();
    if (error.name === "AbortError") note("Stopped");
    else showError(error);
  } finally {
    answer.removeAttribute("aria-busy");
    running = undefined;
    setBusy(false);
    scroll();
  }
}

/** The server-sent events of a response, parsed as JSON. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const complete = text.split("\n\n");
    text = complete.pop();
    for (const event of complete) {
      const data = event.replace(/^data: ?/, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

/** An error in the API's shape, from the API or the proxy. */
class ApiError extends Error {
  constructor(response, { error }) {
    super(error.message);
    this.title = `${response.status} ${error.code}`;
  }
}

function showError(error) {
  const card = show("error", "");
  card.setAttribute("role", "alert");
  const title = document.createElement("b");
  const text = document.createElement("span");
  if (error instanceof ApiError) {
    title.textContent = error.title;
    text.textContent = error.message;
  } else if (location.origin !== origin) {
    title.textContent = "Blocked by the browser";
    text.textContent = `The proxy does not list the origin ${location.origin}, so a page there can read no answer. Listed is ${origin}.`;
  } else {
    title.textContent = "No answer";
    text.textContent = `${error.message}. Is the proxy running?`;
  }
  card.append(title, text);
}

function note(text) {
  show("note", text);
}

function show(kind, text) {
  byId("empty")?.remove();
  const element = document.createElement("p");
  element.className = kind;
  element.textContent = text;
  conversation.append(element);
  scroll();
  return element;
}

function scroll() {
  conversation.scrollTop = conversation.scrollHeight;
}

function setBusy(busy) {
  send.hidden = busy;
  stop.hidden = !busy;
  for (const idea of document.querySelectorAll("[data-say]")) idea.disabled = busy;
  if (!busy) message.focus();
}
