// The page at /: one prompt to several adapters, and the table of them.
'use strict';

const REFRESH_MS = 2000;
const MOST_ROWS = 200;
const $ = (id) => document.getElementById(id);

let base = '';
const picked = new Set();
let running = null;  // the AbortController of the answers under way

function headers() {
  const key = $('key').value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `${response.status} ${response.statusText}`);
}

function element(tag, text, parent) {
  const made = document.createElement(tag);
  made.textContent = text;
  parent?.append(made);
  return made;
}

// ---- the table

const UNITS = ['B', 'KB', 'MB', 'GB', 'TB'];
function size(bytes) {
  let unit = 0;
  for (; bytes >= 10000 && unit < UNITS.length - 1; ++unit) bytes /= 1000;
  return `${Math.round(bytes)} ${UNITS[unit]}`;
}

function place(adapter) {
  if (adapter.device_bytes > 0) return 'device';
  return adapter.in_host ? 'memory' : 'disk';
}

function rank(adapter) {
  const { min_rank: least, max_rank: most } = adapter;
  return least === most ? `${most}` : `${least}–${most}`;
}

function row(name, cells) {
  const line = document.createElement('tr');
  const box = document.createElement('input');
  box.type = 'checkbox';
  box.checked = picked.has(name);
  box.setAttribute('aria-label', `pick ${name}`);
  box.addEventListener('change', () => (box.checked ? picked.add(name) : picked.delete(name)));
  element('td', '', line).append(box);
  for (const cell of [name, ...cells]) element('td', cell, line);
  return line;
}

async function refresh() {
  const query = new URLSearchParams({ page_size: MOST_ROWS, name_prefix: $('filter').value });
  try {
    if (!base) {
      base = (await (await ask('/v1/models')).json()).data[0].id;
      $('model').textContent = base;
      picked.add(base);
    }
    const page = await (await ask(`/v1/adapters?${query}`)).json();
    const rows = page.adapters.map((adapter) => row(adapter.name, [
      adapter.version.slice(0, 8), adapter.variant, rank(adapter), place(adapter),
      size(adapter.bytes), adapter.requests, adapter.active_requests]));
    const focused = document.activeElement.getAttribute('aria-label');
    $('adapters').replaceChildren(row(base, ['', 'base model', '', '', '', '', '']), ...rows);
    if (focused) document.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
    $('notice').textContent = page.next_page_token ? `the first ${MOST_ROWS}` : '';
  } catch (error) {
    $('notice').textContent = error.message;
  }
}

// ---- the answers

// The data of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split('\n\n');
    text = parts.pop();
    for (const part of parts) {
      if (part.startsWith('data: ') && part !== 'data: [DONE]') yield JSON.parse(part.slice(6));
    }
  }
}

function request(model) {
  const prompt = $('prompt').value;
  const shared = {
    model, stream: true, stream_options: { include_usage: true },
    max_tokens: Number($('tokens').value), temperature: Number($('temperature').value),
  };
  return $('chat').checked
    ? ['/v1/chat/completions', { ...shared, messages: [{ role: 'user', content: prompt }] }]
    : ['/v1/completions', { ...shared, prompt }];
}

async function answer(model, signal) {
  const card = document.createElement('article');
  element('h3', model, card);
  const text = element('pre', '', card);
  const foot = element('footer', 'waiting', card);
  $('answers').append(card);
  const start = performance.now();
  let first = null;
  try {
    const [path, body] = request(model);
    const response = await ask(path, {
      method: 'POST', signal, body: JSON.stringify(body),
      headers: { 'Content-Type': 'application/json' },
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      const piece = choice?.delta?.content ?? choice?.text ?? '';
      if (piece) first ??= performance.now();
      text.textContent += piece;
      if (event.usage) {
        const seconds = (performance.now() - start) / 1000;
        const waited = Math.round((first ?? performance.now()) - start);
        foot.textContent =
          `${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s, first after ${waited} ms`;
      }
    }
  } catch (error) {
    if (error.name === 'AbortError') {
      foot.textContent = 'stopped';
      return;
    }
    card.className = 'failed';
    text.textContent += error.message;
    foot.textContent = 'failed';
  }
}

async function send(event) {
  event.preventDefault();
  if (running || picked.size === 0) return;
  running = new AbortController();
  $('send').disabled = true;
  $('stop').disabled = false;
  $('answers').replaceChildren();
  await Promise.all([...picked].map((model) => answer(model, running.signal)));
  running = null;
  $('send').disabled = false;
  $('stop').disabled = true;
  refresh();
}

$('ask').addEventListener('submit', send);
$('stop').addEventListener('click', () => running?.abort());
$('key').addEventListener('change', refresh);
$('filter').addEventListener('input', refresh);
refresh();
setInterval(refresh, REFRESH_MS);
