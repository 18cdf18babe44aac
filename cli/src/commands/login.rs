//! `mayfly login` tests a token, and stores it if it works.

use std::io::{self, BufRead, IsTerminal, Read};

use zeroize::Zeroizing;

use crate::Context;
use crate::client::{self, Api};
use crate::failure::Failure;
use crate::route::Route;
use crate::session::{Session, Token};
use crate::ui;

const TOKEN_BYTES: u64 = 64 << 10;

pub(crate) async fn run(context: &Context) -> Result<(), Failure> {
    let given = &context.connection;
    let session = match Session::given(given)? {
        Some(session) => session,
        None => {
            let (address, tls) = (given.address_or_default(), given.tls.given()?);
            // This is checked before somebody types a token that would not be sent.
            tls.check(&client::address(&address)?)?;
            Session {
                token: ask(&address)?,
                address,
                tls,
            }
        }
    };
    let api = Api::new(&session)?;
    api.get(&Route::to("leases").with("limit", Some(1))).await?;
    let file = session.keep()?;
    ui::note(&format!(
        "the token for {} is kept in {}",
        api.address(),
        file.display()
    ));
    Ok(())
}

fn ask(address: &str) -> Result<Token, Failure> {
    let text = if io::stdin().is_terminal() {
        rpassword::prompt_password(format!("Token for {address}: "))
    } else {
        let mut line = String::new();
        io::stdin()
            .lock()
            .take(TOKEN_BYTES)
            .read_line(&mut line)
            .map(|_| line)
    };
    let text = text
        .map(Zeroizing::new)
        .map_err(|error| Failure::Usage(format!("cannot read the token: {error}")))?;
    Token::read(&text).ok_or_else(|| Failure::Usage("no token is given".into()))
}
