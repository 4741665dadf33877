// The page of `longshort serve`. Whatever a model writes is put there as text, never as markup.
"use strict";

const at = (id) => document.getElementById(id);
const numberOf = (id) => (at(id).value === "" ? null : Number(at(id).value));

async function ask(path, body, signal) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const answer = await fetch(path, options || {});
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}

function say(place, words, problem = false) {
  place.textContent = words;
  place.classList.toggle("problem", problem);
}

// ------------------------------------------------------------------------------------------------ writing

let writing = null;

// The data of server-sent events, one after the other.
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

async function write(event) {
  event.preventDefault();
  writing?.abort();
  const mine = (writing = new AbortController());
  const prompt = at("prompt").value;
  const shown = document.createElement("span");
  shown.className = "prompt";
  shown.textContent = prompt;
  const text = document.createTextNode("");
  at("text").replaceChildren(shown, text);
  at("halt").disabled = false;
  say(at("told"), "");
  const body = { prompt, max_tokens: numberOf("length") ?? 400, temperature: numberOf("temperature") ?? 1, top_p: numberOf("top-p") ?? 1, stream: true };
  if (numberOf("seed") !== null) body.seed = numberOf("seed");
  const begin = performance.now();
  try {
    for await (const data of eventsOf(await ask("v1/completions", body, mine.signal))) {
      if (data === "[DONE]") break;
      const piece = JSON.parse(data);
      text.appendData(piece.choices[0].text);
      const seconds = (performance.now() - begin) / 1000;
      say(at("told"), `${text.length.toLocaleString()} characters in ${seconds.toFixed(2)} s; seed ${piece.seed}`);
    }
  } catch (error) {
    if (error.name !== "AbortError") say(at("told"), error.message, true);
  }
  if (writing === mine) at("halt").disabled = true;
}

// ------------------------------------------------------------------------------------------------ looking inside

// Surprise: the more bits, the warmer. A unit: warm where it is positive, cold where it is negative.
function colour(span, value, most) {
  const strength = Math.min(Math.abs(value) / most, 1) * 0.75;
  span.style.backgroundColor = `rgba(var(${value < 0 ? "--cold" : "--warm"}), ${strength.toFixed(3)})`;
}

function paint(symbols, values, most, titleOf) {
  at("heat").replaceChildren(
    ...symbols.map((symbol, i) => {
      const span = document.createElement("span");
      span.textContent = symbol;
      if (values[i] !== null) {
        colour(span, values[i], most);
        span.title = titleOf(values[i]);
      }
      return span;
    }),
  );
}

async function look(event) {
  event?.preventDefault();
  const body = { text: at("read").value, layer: numberOf("layer") ?? 0 };
  if (numberOf("unit") !== null) body.unit = numberOf("unit");
  if (!body.text) return say(at("legend"), "There is no text to read.", true);
  try {
    const found = await (await ask("v1/inspect", body)).json();
    const options = found.following.map((each) => {
      const option = new Option(`${each.aspect} (unit ${each.layer}:${each.unit}, ${each.correlation.toFixed(2)})`);
      option.value = `${each.layer}:${each.unit}`;
      return option;
    });
    at("by").replaceChildren(new Option("surprise", ""), ...options);
    at("by").value = body.unit === undefined ? "" : `${body.layer}:${body.unit}`;
    if (at("by").selectedIndex < 0) at("by").value = "";
    at("by").disabled = options.length === 0;
    if (found.values) {
      paint(found.symbols, found.values, Math.max(...found.values.map(Math.abs), 1e-6), (value) => value.toFixed(3));
      say(at("legend"), `${found.value} of unit ${body.layer}:${body.unit}: orange positive, blue negative.`);
    } else {
      const bits = found.nats.map((nats) => (nats === null ? null : nats / Math.LN2));
      paint(found.symbols, bits, 10, (value) => `${value.toFixed(2)} bits`);
      const mean = found.nats_per_token === null ? "" : ` ${(found.nats_per_token / Math.LN2).toFixed(2)} bits a symbol in the mean.`;
      say(at("legend"), `The warmer, the more surprised the model was by a symbol.${mean}`);
    }
  } catch (error) {
    say(at("legend"), error.message, true);
  }
}

function chosen() {
  const [layer, unit] = at("by").value.split(":");
  at("layer").value = unit === undefined ? 0 : layer;
  at("unit").value = unit ?? "";
  look();
}

at("write").addEventListener("submit", write);
at("halt").addEventListener("click", () => writing?.abort());
at("look").addEventListener("submit", look);
at("by").addEventListener("change", chosen);
at("take").addEventListener("click", () => {
  at("read").value = at("text").textContent.slice(0, 4096);
  look();
});
ask("v1/models")
  .then((answer) => answer.json())
  .then(({ data: [model] }) => say(at("model"), `${model.id}: ${model.cell.toUpperCase()} ${model.layers} × ${model.hidden}`))
  .catch((error) => say(at("model"), error.message, true));
