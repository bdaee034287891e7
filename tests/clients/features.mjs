// What the clients on Node share: each feature runs by itself, and its result is a word.
export async function report(features) {
  const results = { why: "" };
  for (const [name, feature] of Object.entries(features)) {
    // The toys may sample end-of-text at once, so a feature has three tries.
    for (let attempt = 0; attempt < 3 && results[name] !== "yes"; attempt++) {
      try {
        await feature();
        results[name] = "yes";
      } catch (error) {
        results[name] = "no";
        if (attempt === 2) results.why += `${name}: ${String(error).slice(0, 300)}; `;
      }
    }
  }
  console.log(JSON.stringify(results));
}
