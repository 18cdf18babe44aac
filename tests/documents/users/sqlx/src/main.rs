//! Uses the snippet for sqlx, which is in the file `SNIPPET`. Prints the accounts that it has seen.

include!(env!("SNIPPET"));

fn number(name: &str) -> anyhow::Result<u64> {
    Ok(std::env::var(name)?.parse()?)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let accounts = usize::try_from(number("ACCOUNTS")?)?;
    let end = tokio::time::Instant::now() + Duration::from_secs(number("SECONDS")?);
    let pool = open_pool().await?;
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < accounts && tokio::time::Instant::now() < end {
        let user = sqlx::query_scalar("SELECT current_user::text").fetch_one(&pool);
        seen.insert(user.await.map(|user: String| user)?);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("{}", Vec::from_iter(seen.iter().cloned()).join(" "));
    anyhow::ensure!(seen.len() >= accounts, "too few accounts");
    Ok(())
}
