// Uses the snippet for node-postgres: pool.js SNIPPET. Prints the accounts that it has seen.
const { pool } = require(process.argv[2]);
const accounts = Number(process.env.ACCOUNTS);
const seen = new Set(), end = Date.now() + Number(process.env.SECONDS) * 1000;
(async () => {
  while (seen.size < accounts && Date.now() < end) {
    const { rows } = await pool.query("SELECT current_user");
    seen.add(rows[0].current_user);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  console.log([...seen].join(" "));
  process.exit(seen.size >= accounts ? 0 : 1);
})().catch((error) => { console.error(error); process.exit(1); });
