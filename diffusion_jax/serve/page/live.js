// A live canvas that is open while somebody looks at it.

import { Live } from "/page/api.js";

const WINDOW = 2000; // milliseconds whose frames are counted

export class Session {
  static WAITING = "waiting for the first picture";

  /**
   * wanted: () -> whether it is to be open.
   * state: () -> the values to draw.
   * show: (Blob, text) shows a frame and how fast they come.
   * tell: (text, isError) tells what happens.
   */
  constructor(wanted, state, show, tell) {
    Object.assign(this, { wanted, state, show, tell, live: null, times: [] });
  }

  update() {
    if (this.wanted() && !this.live) {
      this.tell(Session.WAITING);
      this.live = new Live(this.state, (blob, seconds) => this.show(blob, this.speed(seconds)), this.tell);
    }
    if (!this.wanted() && this.live) {
      this.live.close();
      this.live = null;
    }
  }

  speed(seconds) {
    const now = performance.now();
    this.times = [...this.times.filter((time) => now - time < WINDOW), now];
    const rate = 1000 * (this.times.length - 1) / (now - this.times[0]);
    return `${Math.round(1000 * seconds)} ms` + (this.times.length > 2 ? ` · ${rate.toFixed(1)} frames a second` : "");
  }
}
