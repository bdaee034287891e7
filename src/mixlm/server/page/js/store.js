// Conversations in this browser's IndexedDB. Where the browser keeps nothing, they last as long as the page.

const NAME = "mixlm";
const STORE = "conversations";

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

function open() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => {
    // The list of conversations is read from the index alone.
    request.result.createObjectStore(STORE, { keyPath: "id" }).createIndex("heads", ["updated", "title"]);
  };
  return done(request);
}

class Browser {
  constructor(database) {
    this.database = database;
  }

  objects(mode) {
    return this.database.transaction(STORE, mode).objectStore(STORE);
  }

  // Returns [{ id, title, updated }], newest first.
  list() {
    return new Promise((resolve, reject) => {
      const heads = [];
      const request = this.objects("readonly").index("heads").openKeyCursor(null, "prev");
      request.onerror = () => reject(request.error);
      request.onsuccess = () => {
        const cursor = request.result;
        if (!cursor) return resolve(heads);
        const [updated, title] = cursor.key;
        heads.push({ id: cursor.primaryKey, title, updated });
        cursor.continue();
      };
    });
  }

  get(id) {
    return done(this.objects("readonly").get(id));
  }

  put(conversation) {
    return done(this.objects("readwrite").put(conversation));
  }

  delete(id) {
    return done(this.objects("readwrite").delete(id));
  }
}

class Memory {
  conversations = new Map();

  async list() {
    return [...this.conversations.values()]
      .map(({ id, title, updated }) => ({ id, title, updated }))
      .sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    return this.conversations.get(id);
  }

  async put(conversation) {
    this.conversations.set(conversation.id, structuredClone(conversation));
  }

  async delete(id) {
    this.conversations.delete(id);
  }
}

export async function openStore() {
  try {
    return { store: new Browser(await open()), lasting: true };
  } catch {
    return { store: new Memory(), lasting: false };
  }
}
