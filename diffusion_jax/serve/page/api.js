// The server: requests whose answers come piece by piece, and the live canvas.

const GONE = "The server does not answer. Is it still running?";
const TOKEN = "The server does not know this browser any more: open the address with the token that it printed, then go on here.";
const AGAIN = 2000; // milliseconds until a lost live canvas is opened again

async function ask(path, options = {}) {
  const headers = { ...options.headers, "x-requested-with": "fetch" }; // so that the browser asks for no password itself
  const answer = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error(GONE);
  });
  if (answer.status === 401) throw new Error(TOKEN);
  return answer;
}

export const json = async (path) => (await ask(path)).json();

/** Ask for pictures. Yields [event, data]; an error is thrown, with the field that is wrong. `signal` cancels. */
export async function* generate(values, signal) {
  const headers = { "content-type": "application/json" };
  const answer = await ask("/api/generate", { method: "POST", headers, body: JSON.stringify(values), signal });
  if (!answer.ok) {
    const { message, param } = (await answer.json()).error;
    throw Object.assign(new Error(message), { field: param });
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(GONE);
    });
    if (done) throw new Error(GONE);
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const [, name, data] = part.match(/^event: (\w+)\ndata: (.*)$/s);
      if (name === "error") throw new Error(JSON.parse(data).message);
      yield [name, JSON.parse(data)];
      if (name === "done") return;
    }
  }
}

/** A live canvas. The server asks for a frame; it gets the newest state once that differs from the last one sent. */
export class Live {
  /** state: () -> the values to draw. show: (Blob, seconds) shows a frame. tell: (text, isError) tells what happens. */
  constructor(state, show, tell) {
    Object.assign(this, { state, show, tell, seconds: 0 });
    this.connect();
    this.timer = setInterval(() => this.answer(), 15);
  }

  connect() {
    Object.assign(this, { asked: false, sent: "" });
    this.socket = new WebSocket(`${location.protocol.replace("http", "ws")}//${location.host}/api/live`);
    this.socket.onmessage = ({ data }) => this.take(data);
    this.socket.onopen = () => {
      if (this.lost) this.tell("connected again");
      this.lost = false;
    };
    this.socket.onclose = (event) => this.reopen(event);
  }

  async reopen({ reason }) {
    this.asked = false;
    const why = reason || await json("/health").then(() => "The connection is lost.", (error) => error.message);
    if (this.closed) return;
    this.lost = true;
    this.tell(reason || `${why} Trying again …`, true);
    if (!reason) this.again = setTimeout(() => this.connect(), AGAIN);
  }

  take(data) {
    if (data instanceof Blob) return this.show(data, this.seconds);
    const message = JSON.parse(data);
    if (message.type === "next") this.asked = true;
    if (message.type === "frame") this.seconds = message.seconds;
    if (message.type === "error") {
      this.tell(message.message, true);
      if (message.retry) setTimeout(() => (this.sent = ""), 1000 * message.retry);
    }
    this.answer();
  }

  answer() {
    if (!this.asked) return;
    const state = JSON.stringify(this.state());
    if (state === this.sent) return;
    this.asked = false;
    this.sent = state;
    this.socket.send(state);
  }

  close() {
    this.closed = true;
    clearInterval(this.timer);
    clearTimeout(this.again);
    this.socket.close();
  }
}
