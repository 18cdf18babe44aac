//! A rogue server: it speaks PostgreSQL's protocol as far as a login, requests what an attacker would like to have,
//! and records all it gets. Or it stands between a client and a server.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::pki::Pki;

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// What the server wants in a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// The password in clear.
    Password,
    /// An MD5 hash.
    Md5,
    /// A SCRAM proof, not bound to the connection.
    Scram,
    /// Nothing: it accepts any login.
    Nothing,
    /// The login is passed on to the server on this port, and then everything.
    Between { port: u16, tls: bool },
}

/// A rogue server on loopback.
pub struct Rogue {
    pub port: u16,
    /// What came after each client's first message, without TLS.
    heard: Arc<Mutex<Vec<u8>>>,
    logins: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Rogue {
    /// Starts the server. With TLS it has a certificate of an authority that nobody knows.
    pub async fn start(wants: Wants, tls: bool) -> Self {
        let tls = tls.then(|| {
            let pki = Pki::new();
            pki.certificate("server", "rogue", Some("DNS:localhost,IP:127.0.0.1"));
            acceptor(&pki)
        });
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let logins = Arc::new(AtomicUsize::new(0));
        let (ear, count) = (heard.clone(), logins.clone());
        let task = tokio::spawn(async move {
            loop {
                let Ok((socket, _)) = listener.accept().await else {
                    continue;
                };
                let (ear, count, tls) = (ear.clone(), count.clone(), tls.clone());
                tokio::spawn(async move {
                    // The client should abort the login.
                    let _ = serve(socket, tls, wants, &ear, &count).await;
                });
            }
        });
        Self {
            port,
            heard,
            logins,
            task,
        }
    }

    /// All that clients sent after their first message, which names user and database.
    pub fn heard(&self) -> Vec<u8> {
        self.heard.lock().unwrap().clone()
    }

    /// Clients that began a login.
    pub fn logins(&self) -> usize {
        self.logins.load(Ordering::SeqCst)
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn acceptor(pki: &Pki) -> TlsAcceptor {
    let certificate = CertificateDer::from_pem_slice(pki.text("server.crt").as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(pki.text("server.key").as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

async fn serve(
    mut socket: TcpStream,
    tls: Option<TlsAcceptor>,
    wants: Wants,
    heard: &Mutex<Vec<u8>>,
    logins: &AtomicUsize,
) -> std::io::Result<()> {
    let first = startup(&mut socket).await?;
    if first != SSL_REQUEST {
        logins.fetch_add(1, Ordering::SeqCst);
        return ask(socket, &first, wants, heard).await;
    }
    let Some(tls) = tls else {
        socket.write_all(b"N").await?;
        let first = startup(&mut socket).await?;
        logins.fetch_add(1, Ordering::SeqCst);
        return ask(socket, &first, wants, heard).await;
    };
    socket.write_all(b"S").await?;
    let mut stream = tls.accept(socket).await?;
    let first = startup(&mut stream).await?;
    logins.fetch_add(1, Ordering::SeqCst);
    ask(stream, &first, wants, heard).await
}

/// A message without a tag, with its length.
async fn startup(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let length = stream.read_u32().await?;
    let mut message = length.to_be_bytes().to_vec();
    message.resize(usize::try_from(length).unwrap().max(4), 0);
    stream.read_exact(&mut message[4..]).await?;
    Ok(message)
}

fn request(number: u32, rest: &[u8]) -> Vec<u8> {
    let length = u32::try_from(8 + rest.len()).unwrap();
    [
        &b"R"[..],
        &length.to_be_bytes(),
        &number.to_be_bytes(),
        rest,
    ]
    .concat()
}

async fn ask(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    first: &[u8],
    wants: Wants,
    heard: &Mutex<Vec<u8>>,
) -> std::io::Result<()> {
    let asked = match wants {
        Wants::Password => request(3, b""),
        Wants::Md5 => request(5, b"salt"),
        Wants::Scram => request(10, b"SCRAM-SHA-256\0\0"),
        Wants::Nothing => [
            request(0, b""),
            b"S\0\0\0\x19server_version\x0015.0\0\0".to_vec(),
            b"Z\0\0\0\x05I".to_vec(),
        ]
        .concat(),
        Wants::Between { port, tls } => {
            let mut far = TcpStream::connect(("127.0.0.1", port)).await?;
            if !tls {
                return pass_on(stream, far, first, heard).await;
            }
            far.write_all(&SSL_REQUEST).await?;
            assert_eq!(far.read_u8().await?, b'S');
            let name = ServerName::try_from("localhost").unwrap();
            let far = connector().connect(name, far).await?;
            return pass_on(stream, far, first, heard).await;
        }
    };
    stream.write_all(&asked).await?;
    let mut is_first = true;
    let mut bytes = vec![0; 4096];
    loop {
        let n = stream.read(&mut bytes).await?;
        if n == 0 {
            return Ok(());
        }
        heard.lock().unwrap().extend_from_slice(&bytes[..n]);
        if wants == Wants::Scram && is_first {
            is_first = false;
            let said = String::from_utf8_lossy(&bytes[..n]).into_owned();
            let nonce = said.rsplit_once("r=").map_or("", |(_, nonce)| nonce);
            // This is the minimum number of rounds, with which an attacker can guess the password from the proof.
            let server_first = format!("r={nonce}rogue,s=c2FsdA==,i=1");
            stream
                .write_all(&request(11, server_first.as_bytes()))
                .await?;
        }
    }
}

/// Carries a session between a client and a server.
async fn pass_on(
    near: impl AsyncRead + AsyncWrite + Unpin,
    mut far: impl AsyncRead + AsyncWrite + Unpin,
    first: &[u8],
    heard: &Mutex<Vec<u8>>,
) -> std::io::Result<()> {
    far.write_all(first).await?;
    let (mut near_in, mut near_out) = tokio::io::split(near);
    let (mut far_in, mut far_out) = tokio::io::split(far);
    let there = async {
        let mut bytes = vec![0; 16 * 1024];
        loop {
            let n = near_in.read(&mut bytes).await?;
            if n == 0 {
                return std::io::Result::Ok(());
            }
            heard.lock().unwrap().extend_from_slice(&bytes[..n]);
            far_out.write_all(&bytes[..n]).await?;
            far_out.flush().await?;
        }
    };
    let back = async {
        let mut bytes = vec![0; 16 * 1024];
        loop {
            let n = far_in.read(&mut bytes).await?;
            if n == 0 {
                return std::io::Result::Ok(());
            }
            near_out.write_all(&bytes[..n]).await?;
            near_out.flush().await?;
        }
    };
    tokio::select! {
        ended = there => ended,
        ended = back => ended,
    }
}

fn connector() -> TlsConnector {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer(provider)))
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

/// The rogue does not verify the server.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.0.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}
