//! Opens a listener.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpListener;
use tracing::info;

/// Opens a listener, with the key's name in the error. `[::]` serves IPv4 too. If the kernel has no IPv6
/// (`ipv6.disable=1`), 0.0.0.0 replaces it.
///
/// # Errors
/// The address cannot be listened on.
pub async fn listen(key: &str, address: SocketAddr) -> Result<TcpListener, String> {
    let bound = match TcpListener::bind(address).await {
        Err(error) if lacks_ipv6(&error) && is_any_ipv6(address) => {
            let instead = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
            info!(key, %address, %instead, "this machine has no IPv6: listening on IPv4 only");
            TcpListener::bind(instead).await
        }
        bound => bound,
    };
    bound.map_err(|error| format!("{key}: cannot listen on {address}: {error}"))
}

/// Whether the kernel has no IPv6: EAFNOSUPPORT, socket(2). An IPv6 address that this machine does not have, or
/// that is in use, is another error (EADDRNOTAVAIL, EADDRINUSE; bind(2)).
fn lacks_ipv6(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
        || error.kind() == ErrorKind::AddrNotAvailable
}

fn is_any_ipv6(address: SocketAddr) -> bool {
    address.is_ipv6() && address.ip().is_unspecified()
}
