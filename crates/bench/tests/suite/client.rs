//! The client against servers that keep to the protocol and that do not.

use std::sync::Arc;
use std::time::Duration;

use bitfast_bench::client::{Ask, Client, Network, Options, Prompt};

use crate::fake::{Dialect, Fake, Lie, Setup, endpoint};

fn ask(max_tokens: u32) -> Ask {
    Ask::new("fake", Prompt::Tokens(vec![1, 2, 3]), max_tokens)
}

#[tokio::test(start_paused = true)]
async fn a_stream_and_a_whole_answer_are_the_same() {
    for dialect in [Dialect::Bitfast, Dialect::Vllm, Dialect::Plain] {
        let client = Fake::start(dialect, Setup::default(), &[]).client();
        let ask = ask(6).with("logprobs", 1).with("return_token_ids", true);
        let whole = client.complete(&ask).await.unwrap();
        let streamed = client.stream_all(&ask).await.unwrap();
        assert_eq!(whole.answers, streamed.answers);
        assert_eq!(whole.one().unwrap().logprobs.as_ref().unwrap().len(), 6);
        assert_eq!((whole.completion_tokens(), streamed.completion_tokens()), (6, 6));
        whole.expect_tokens(3, 6).unwrap();
        streamed.expect_tokens(3, 6).unwrap();
        // Virtual time: 5 ms to the first token, 2 ms to each of the others.
        let gaps: Vec<_> = streamed.arrivals.windows(2).map(|w| w[1].at - w[0].at).collect();
        assert_eq!(streamed.arrivals[0].at - streamed.sent, Duration::from_millis(5));
        assert_eq!(gaps, [Duration::from_millis(2); 5]);
        assert!(streamed.counted);
    }
}

#[tokio::test(start_paused = true)]
async fn tokens_are_counted_in_every_way_that_a_server_offers() {
    let client = Fake::start(Dialect::Bitfast, Setup::default(), &[]).client();
    let by_usage = serde_json::json!({"include_usage": true, "continuous_usage_stats": true});
    for (ask, counted) in [
        (ask(4), false),
        (ask(4).with("return_token_ids", true), true),
        (ask(4).with("stream_options", by_usage), true),
    ] {
        let asked = client.stream_all(&ask).await.unwrap();
        assert_eq!(asked.arrivals.iter().map(|a| a.tokens).collect::<Vec<_>>(), [1, 1, 1, 1]);
        assert_eq!(asked.counted, counted);
    }
}

#[tokio::test(start_paused = true)]
async fn failures_name_the_route_and_the_reason() {
    let fails = |lie: Lie, expected: &'static str| async move {
        let client = Fake::start(Dialect::Bitfast, Setup::default(), &[lie]).client();
        let mut first = Ok(());
        for _ in 0..8 {
            let asked = client.stream_all(&ask(3).with("return_token_ids", true)).await;
            let checked = asked.and_then(|a| a.expect_tokens(3, 3));
            first = first.and(checked);
        }
        let message = first.unwrap_err().to_string();
        assert!(message.contains("http://fake:1/v1/completions: "), "{lie:?}: {message}");
        assert!(message.contains(expected), "{lie:?}: {message}");
    };
    fails(Lie::FailsOne, "HTTP 500: out of luck").await;
    fails(Lie::DropsARequest, "connection closed before message completed").await;
    fails(Lie::ClosesMidBody, "the answer broke off").await;
    fails(Lie::PromptTokens, "usage says 4 prompt tokens, 3 were sent").await;
    fails(Lie::CompletionTokens, "usage says 4 completion tokens, 3 were asked for").await;
    fails(Lie::DropsAToken, "usage says 4 completion tokens").await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_given_up() {
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[]);
    fake.engine.set_paused(true);
    let message = fake.client().complete(&ask(1)).await.unwrap_err().to_string();
    assert!(message.contains("no answer within 5 s"), "{message}");
    // It goes on when it speaks again.
    fake.engine.set_paused(false);
    fake.client().complete(&ask(1)).await.unwrap();
}

#[tokio::test]
async fn over_a_socket_with_a_key() {
    let mut fake = Fake::new(Dialect::Plain, Setup::default(), &[]);
    fake.api_key = Some("secret".to_string());
    let fake = std::sync::Arc::new(fake);
    let address = fake.listen().await;
    let options = |key: Option<&str>| Options { api_key: key.map(str::to_string), ..Options::default() };
    let client = Client::new(endpoint(&address), options(Some("secret")));
    for _ in 0..3 {
        client.complete(&ask(2)).await.unwrap().expect_tokens(3, 2).unwrap();
    }
    let error = Client::new(endpoint(&address), options(None)).complete(&ask(2)).await.unwrap_err();
    assert_eq!(error.status(), Some(401));
    let nobody = Client::new(endpoint("127.0.0.1:9"), options(None)).complete(&ask(2)).await.unwrap_err();
    assert!(nobody.to_string().starts_with("http://127.0.0.1:9: "), "{nobody}");
}

/// A certificate for this machine and its key, and the certificate in a PEM file.
fn certificate(dir: &std::path::Path) -> (rcgen::CertifiedKey<rcgen::KeyPair>, std::path::PathBuf) {
    let made =
        rcgen::generate_simple_self_signed(["localhost".to_string(), "127.0.0.1".to_string()]).unwrap();
    let path = dir.join("cert.pem");
    std::fs::write(&path, made.cert.pem()).unwrap();
    (made, path)
}

#[tokio::test]
async fn https_is_encrypted_and_certificates_are_checked() {
    use tokio_rustls::rustls::{ServerConfig, crypto::ring::default_provider};
    let dir = tempfile::tempdir().unwrap();
    let (made, pem) = certificate(dir.path());
    let key = made.signing_key.serialize_der().try_into().unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let fake = Fake::start(Dialect::Plain, Setup::default(), &[]);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (connector, inner) = (fake.connector(), endpoint("fake:1"));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, theirs) = (acceptor.clone(), connector.connect(&inner));
            tokio::spawn(async move {
                // A client that does not trust us ends here.
                let Ok(mut ours) = acceptor.accept(stream).await else { return };
                let _ = tokio::io::copy_bidirectional(&mut ours, &mut theirs.await.unwrap()).await;
            });
        }
    });
    let client = |network: Network, host: &str| {
        let options = Options { connect: Arc::new(network), ..Options::default() };
        Client::new(endpoint(&format!("https://{host}:{port}/v1")), options)
    };
    for host in ["localhost", "127.0.0.1"] {
        let trusting = client(Network::trusting(&pem).unwrap(), host);
        trusting.stream_all(&ask(3)).await.unwrap().expect_tokens(3, 3).unwrap();
        trusting.complete(&ask(3)).await.unwrap().expect_tokens(3, 3).unwrap();
    }
    let error = client(Network::default(), "localhost").complete(&ask(1)).await.unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("https://localhost:{port}: ")) && error.contains("certificate"),
        "{error}"
    );
    // Another certificate for the same name.
    let (_, other) = certificate(dir.path());
    let error = client(Network::trusting(&other).unwrap(), "localhost").complete(&ask(1)).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    std::fs::write(&pem, "no certificate").unwrap();
    assert!(Network::trusting(&pem).err().unwrap().is_user_error());
    assert!(Network::trusting(&dir.path().join("absent")).err().unwrap().is_user_error());
}
