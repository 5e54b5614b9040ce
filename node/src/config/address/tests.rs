//! Good and bad addresses of every kind, and that none shows a password.

use super::*;

#[test]
fn etcd_endpoints_are_read_as_people_write_them() {
    for (text, urls) in [
        ("http://etcd:2379", "http://etcd:2379"),
        ("etcd:2379", "http://etcd:2379"),
        (" http://a:1/ , http://b:2 ", "http://a:1, http://b:2"),
        ("http://[::1]:2379", "http://[::1]:2379"),
        ("rack_1.example-x:65535", "http://rack_1.example-x:65535"),
    ] {
        let endpoints: EtcdEndpoints = text.parse().unwrap();
        assert_eq!(endpoints.to_string(), urls, "{text}");
        assert_eq!(urls.parse(), Ok(endpoints), "what is shown reads back");
    }
}

#[test]
fn what_is_no_etcd_endpoint_is_refused_with_the_reason() {
    for (text, wrong) in [
        ("", "is empty"),
        (" ", "is empty"),
        ("http://a:1,", "an empty entry"),
        (",http://a:1", "an empty entry"),
        ("http://a:1,,http://b:2", "an empty entry"),
        ("http://a b:1", "a blank"),
        ("http://a:1 http://b:2", "a blank"),
        ("http://a", "has no port"),
        ("a", "has no port"),
        ("http://a:99999", "no port from 1 to 65535"),
        ("http://a:0", "no port from 1 to 65535"),
        ("http://a:+1", "no port from 1 to 65535"),
        ("http://a:", "no port from 1 to 65535"),
        ("http://:2379", "has no host"),
        ("http://", "is empty"),
        ("http://a:1/v3", "goes on after the port"),
        ("http://a:1?x=1", "goes on after the port"),
        ("https://a:1", "asks for TLS"),
        ("etcd://a:1", "an unknown scheme"),
        ("unix:///run/etcd.sock", "an unknown scheme"),
        ("HTTP:/a:1", "goes on after the port"),
        ("http://http://a:1", "has a scheme"),
        ("http://[::1:2379", "not closed"),
        ("http://[nonsense]:1", "no IPv6 address"),
        ("http://::1:2379", "has no port"),
        ("http://a:b:1", "neither a name nor an address"),
        ("http://1.2.3:1", "neither a name nor an address"),
        ("http://a\u{e9}:1", "neither a name nor an address"),
        ("http://user:pw@a:1", "etcd.password_file"),
        ("user:pw@a:1", "etcd.password_file"),
    ] {
        let error = text.parse::<EtcdEndpoints>().unwrap_err().to_string();
        assert!(error.contains(wrong), "{text:?}: {error}");
        assert!(!error.contains("pw"), "{error}");
    }
}

#[test]
fn a_list_has_one_rule_whatever_its_form() {
    let read = |json: &str| serde_json::from_str::<EtcdEndpoints>(json);
    let want: EtcdEndpoints = "http://a:1, http://b:2".parse().unwrap();
    for json in [
        r#"["http://a:1", "http://b:2"]"#,
        r#"["http://a:1, http://b:2"]"#,
        r#""http://a:1,http://b:2""#,
    ] {
        assert_eq!(read(json).unwrap(), want, "{json}");
    }
    for json in ["[]", r#"[""]"#, r#"["http://a:1", ""]"#, "3", "[3]"] {
        assert!(read(json).is_err(), "{json}");
    }
    let many = vec!["http://a:1"; 65].join(",");
    assert!(many.parse::<EtcdEndpoints>().is_err());
}

#[test]
fn addresses_that_others_are_told() {
    for text in ["rack1-host7:7071", "10.0.0.1:1", "[fd00::7]:7071", "a.b:65535"] {
        assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
    }
    for text in [
        "",
        "a",
        ":1",
        "a:0",
        "a:65536",
        "http://a:1",
        "a:1/x",
        "a b:1",
        "0.0.0.0:1",
        "[::]:1",
        "[::ffff:0.0.0.0]:1",
        "u:pw@a:1",
        "::1",
    ] {
        let error = text.parse::<HostPort>().unwrap_err().to_string();
        assert!(error.contains("host:port") && !error.contains("pw"), "{error}");
    }
}

#[test]
fn where_to_listen() {
    for text in ["127.0.0.1:0", " [::1]:8080 ", "0.0.0.0:65535"] {
        assert_eq!(listen_address(text).unwrap(), text.trim().parse().unwrap());
    }
    for (text, words) in [
        ("8081", "127.0.0.1:8081"),
        (":8081", "127.0.0.1:8081"),
        ("localhost:8081", "names a host, and a server listens on an IP address: write 127.0.0.1"),
        ("127.0.0.1", "127.0.0.1:8080"),
        ("127.0.0.1:99999", "127.0.0.1:8080"),
        ("u:pw@127.0.0.1:1", "***@127.0.0.1:1"),
        ("http://127.0.0.1:1", "is no IP address"),
        ("", "is no IP address"),
    ] {
        let error = listen_address(text).unwrap_err().to_string();
        assert!(error.contains(words) && !error.contains("pw"), "{error}");
    }
}

#[test]
fn no_password_is_shown() {
    for text in [
        "http://user:pw@host:1",
        "user:pw@host:1",
        "http://user:p/pw@host:1/",
        "http://user:pw@pw@host:1",
        "http://host:1?password=pw",
        "http://host:1/x#pw",
        "://pw@",
    ] {
        assert!(!shown(text).contains("pw"), "{}", shown(text));
    }
    assert_eq!(shown("http://user:pw@host:1"), "\"http://***@host:1\"");
    assert!(shown(&"x".repeat(10_000)).len() < 200);
    assert_eq!(shown("a\nb"), "\"a\\nb\"");
    assert!(without_secret("http://u:p@h:1".to_owned()).is_err());
    assert_eq!(without_secret("http://h:1/x".to_owned()).unwrap(), "http://h:1/x");
}
