// The form of a turn: one edit or several, each of a text or a chat. What is typed is kept in the
// tab's session storage, so that nothing is lost by a reload.

const DRAFT = "ultraedit.draft";

const edits = document.getElementById("edits");
const ofEdit = document.getElementById("edit-template");
const ofMessage = document.getElementById("message-template");
let made = 0;

const copy = (template) => template.content.firstElementChild.cloneNode(true);
const FIELDS = ["prompt", "target", "rephrases", "locality", "space"];
const field = (box, name) => box.querySelector(`[name="${name}"]`);
const isChat = (box) => box.querySelector('input[value="chat"]').checked;
const lines = (box, name) => field(box, name).value.split("\n").map((line) => line.trim()).filter(Boolean);

function messagesOf(box) {
  return Array.from(box.querySelectorAll(".message"), (message) => ({
    role: field(message, "role").value,
    content: field(message, "content").value,
  }));
}

function number() {
  const all = Array.from(edits.children);
  all.forEach((box, i) => {
    box.querySelector("legend").textContent = all.length > 1 ? `Edit ${i + 1}` : "One edit";
    box.querySelector(".remove-edit").parentElement.hidden = all.length === 1;
    const messages = Array.from(box.querySelectorAll(".message"));
    messages.forEach((message, j) => {
      message.setAttribute("aria-label", `Message ${j + 1}`);
      message.querySelector(".remove-message").hidden = messages.length === 1;
    });
  });
}

/** Show the fields of a text or of a chat; those not shown are off, so that none is asked for. */
function choose(box) {
  for (const [kind, on] of [[".as-text", !isChat(box)], [".as-chat", isChat(box)]]) {
    for (const part of box.querySelectorAll(kind)) part.hidden = part.disabled = !on;
  }
}

function addMessage(box, { role = "user", content = "" } = {}) {
  const message = copy(ofMessage);
  field(message, "role").value = role;
  field(message, "content").value = content;
  message.querySelector(".remove-message").addEventListener("click", () => {
    const next = message.nextElementSibling ?? message.previousElementSibling;
    message.remove();
    changed();
    field(next, "content").focus();
  });
  box.querySelector(".messages").append(message);
  return message;
}

function addEdit(given = {}) {
  const box = copy(ofEdit);
  made += 1;
  for (const radio of box.querySelectorAll("input[type=radio]")) {
    radio.name = `kind-${made}`;
    radio.checked = radio.value === (given.chat ? "chat" : "text");
    radio.addEventListener("change", () => {
      const first = box.querySelector('.message [name="content"]');
      if (isChat(box) && !first.value) first.value = field(box, "prompt").value;
      choose(box);
    });
  }
  for (const hint of box.querySelectorAll("[data-for]")) {
    hint.id = `${hint.dataset.for}-hint-${made}`;
    field(box, hint.dataset.for).setAttribute("aria-describedby", hint.id);
  }
  for (const name of FIELDS) field(box, name).value = given[name] ?? "";
  for (const message of given.messages?.length ? given.messages : [{}]) addMessage(box, message);
  box.querySelector(".add-message").addEventListener("click", () => {
    field(addMessage(box), "content").focus();
    changed();
  });
  box.querySelector(".remove-edit").addEventListener("click", () => {
    box.remove();
    changed();
    document.getElementById("add-edit").focus();
  });
  choose(box);
  edits.append(box);
  return box;
}

function draft() {
  return Array.from(edits.children, (box) => ({
    chat: isChat(box),
    messages: messagesOf(box),
    ...Object.fromEntries(FIELDS.map((name) => [name, field(box, name).value])),
  }));
}

function changed() {
  number();
  try {
    sessionStorage.setItem(DRAFT, JSON.stringify(draft()));
  } catch {
    // What is too long to be kept is still in the form.
  }
}

function recalled() {
  try {
    const found = JSON.parse(sessionStorage.getItem(DRAFT));
    return Array.isArray(found) && found.length ? found : [{}];
  } catch {
    return [{}];
  }
}

/** Fill the form with what was typed before, and follow what is typed. */
export function open() {
  recalled().forEach(addEdit);
  number();
  edits.addEventListener("input", changed);
  edits.addEventListener("change", changed);
  document.getElementById("add-edit").addEventListener("click", () => {
    const box = addEdit();
    changed();
    field(box, "prompt").focus();
  });
  document.getElementById("clear").addEventListener("click", () => {
    edits.replaceChildren();
    const box = addEdit();
    changed();
    field(box, "prompt").focus();
  });
}

/** The edits as POST /v1/edits takes them. */
export function read() {
  return Array.from(edits.children, (box) => {
    const target = field(box, "target").value;
    if (!isChat(box)) {
      const space = field(box, "space").value;
      return {
        prompt: field(box, "prompt").value, target,
        rephrases: lines(box, "rephrases"), locality: lines(box, "locality"),
        ...(space && { space: space === "yes" }),
      };
    }
    const messages = messagesOf(box);
    const asked = (content) => [...messages.slice(0, -1), { ...messages.at(-1), content }];
    return {
      prompt: messages, target,
      rephrases: lines(box, "rephrases").map(asked), locality: lines(box, "locality").map(asked),
    };
  });
}
