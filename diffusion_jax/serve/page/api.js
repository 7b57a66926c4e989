// The server: requests whose answers come piece by piece, and the live canvas.

export const json = async (path) => (await fetch(path)).json();

/** Ask for pictures. Yields [event, data]; an error is thrown. `signal` cancels. */
export async function* generate(values, signal) {
  const headers = { "content-type": "application/json" };
  const answer = await fetch("/api/generate", { method: "POST", headers, body: JSON.stringify(values), signal });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const [, name, data] = part.match(/^event: (\w+)\ndata: (.*)$/s);
      if (name === "error") throw new Error(JSON.parse(data).message);
      yield [name, JSON.parse(data)];
    }
  }
}

/** A live canvas. The server asks for a frame; it gets the newest state once that differs from the last one sent. */
export class Live {
  /** state: () -> the values to draw. show: (Blob, seconds) shows a frame. tell: (text) tells an error. */
  constructor(state, show, tell) {
    Object.assign(this, { state, show, tell, asked: false, sent: "", seconds: 0 });
    this.socket = new WebSocket(`${location.protocol.replace("http", "ws")}//${location.host}/api/live`);
    this.socket.onmessage = ({ data }) => this.take(data);
    this.socket.onclose = ({ reason }) => this.closed || tell(reason || "the server closed the live canvas");
    this.timer = setInterval(() => this.answer(), 15);
  }

  take(data) {
    if (data instanceof Blob) return this.show(data, this.seconds);
    const message = JSON.parse(data);
    if (message.type === "next") this.asked = true;
    if (message.type === "frame") this.seconds = message.seconds;
    if (message.type === "error") this.tell(message.message);
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
    this.socket.close();
  }
}
