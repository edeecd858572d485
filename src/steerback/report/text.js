// Append text to a node as text, never as HTML. Invisible characters and those that change the writing direction are
// shown as code points.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\u{e0000}-\u{e007f}]/u;

function write(parent, text) {
  let run = "";
  const flush = () => {
    if (run) parent.append(document.createTextNode(run));
    run = "";
  };
  for (const character of text) {
    if (!HIDDEN.test(character)) {
      run += character;
      continue;
    }
    flush();
    const shown = document.createElement("span");
    shown.className = "hidden-character";
    shown.textContent = "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parent.append(shown);
  }
  flush();
}

